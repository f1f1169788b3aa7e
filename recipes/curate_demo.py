"""`make curate-demo`: real web pages, from a real web server through every stage of curation into a training run.

The pages are documentation that Debian ships as HTML with pictures (GIMP's manual, the Debian handbook in all its
languages, KiCad's and pygame's manuals, scikit-image's gallery). A web server on this machine serves them, `wget`
crawls it into a WARC file, and the pictures are fetched from it again, since `--allow-host` names it. It stops by
itself. Queries come from WordNet and from the words of the pages' own texts.

Needs apt-get, dpkg and wget; no root. Downloads about 155 MB, once.
"""

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import tyro

from diptych import files
from diptych.cli import exit_on_error
from diptych.cli.training import print_train_report, train_with_progress
from diptych.curate import pipeline
from diptych.curate.config import PipelineConfig
from diptych.curate.queries import build as queries
from diptych.curate.queries.config import QueriesConfig
from diptych.errors import UsageError
from diptych.model.config import get_preset
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.stage.config import EngineConfig
from diptych.stage.run import Engine
from diptych.tokenizer import train_bpe
from diptych.train.config import OptimConfig, RunConfig, TrainConfig

SITES = {
    "gimp": ("gimp-help-en", "usr/share/gimp/2.0/help/en"),
    "handbook": ("debian-handbook", "usr/share/doc/debian-handbook/html"),
    "kicad": ("kicad-doc-en", "usr/share/doc/kicad/help/en"),
    "pygame": ("python-pygame-doc", "usr/share/doc/python-pygame-doc/html"),
    "skimage": ("python-skimage-doc", "usr/share/doc/python-skimage-doc/html"),
}
"""Path on the server -> Debian package and the folder in it."""
VOCAB_SIZE, CONTEXT_LENGTH = 2048, 32
WORDNET = ("wordnet-base", "usr/share/wordnet")


@dataclass(frozen=True, kw_only=True)
class CurateDemo:
    """Where things go and how much is done."""

    work: Path = Path("runs/curate")
    """Folder for everything; what is there is not done again."""
    port: int = 8765
    """Of the web server; it is part of the pages' addresses, and so of the pairs' keys."""
    limit: int = 60
    """Pairs a query."""
    steps: int = 20
    """Of training."""
    engine: EngineConfig = field(default_factory=EngineConfig)


def main(demo: CurateDemo) -> pipeline.PipelineReport:
    """Run the demo from end to end."""
    began = time.monotonic()
    site = build_site(demo.work)
    with serve(site, demo.port), Engine.open(demo.engine) as engine:
        archive = crawl_site(demo.work, demo.port)
        config = PipelineConfig(
            work=demo.work / "stages",
            inputs=(str(archive),),
            queries=demo.work / "queries",
            contact="https://example.org/curate-demo",
            limit=demo.limit,
            allow_host=(f"127.0.0.1:{demo.port}",),
        )
        pipeline.run(config, engine=engine, until="filter")
        listed = queries.run(
            QueriesConfig(
                out=demo.work / "queries",
                wordnet=str(demo.work / "packages" / WORDNET[0] / WORDNET[1]),
                corpus=(str(demo.work / "stages" / "filter" / "part-*.parquet"),),
                min_word_count=3,
                min_bigram_count=3,
                min_pmi=5.0,
            )
        )
        print(f"queries: {listed.queries:,}")
        report = pipeline.run(config, engine=engine)
    print(report.funnel)
    print(f"report: {report.html}")
    if report.left_nothing:
        raise UsageError(report.left_nothing)
    print(f"shards: {report.folder}  (manifest {report.hash}); {time.monotonic() - began:.0f} s")
    train(demo, report.folder)
    return report


def build_site(work: Path) -> Path:
    """Download the packages and lay their pages side by side in one folder."""
    site = work / "site"
    if site.exists():
        return site
    for tool in ("apt-get", "dpkg", "wget"):
        if shutil.which(tool) is None:
            raise UsageError(f"{tool} is not on this machine; this demo takes its pages from Debian's packages")
    packages = (work / "packages").absolute()
    packages.mkdir(parents=True, exist_ok=True)
    for package, folder in (*SITES.values(), WORDNET):
        if (packages / package / folder).exists():
            continue
        print(f"downloading {package}")
        _run("apt-get", "download", "-q", package, where=packages)
        (archive,) = packages.glob(f"{package}_*.deb")
        _run("dpkg", "-x", str(archive), str(packages / package), where=packages)
        archive.unlink()
    with files.atomic_folder(site) as folder:
        links = []
        for name, (package, inside) in SITES.items():
            shutil.copytree(packages / package / inside, folder / name, symlinks=False, ignore_dangling_symlinks=True)
            links.append(f'<a href="{name}/">{name}</a>')
        (folder / "index.html").write_text(f"<title>Documentation</title>{''.join(links)}")
    return site


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is nothing to print."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serve(folder: Path, port: int) -> Iterator[None]:
    """Serve a folder on loopback until the block ends."""
    try:
        server = _Server(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise UsageError(f"port {port} cannot be served on ({error.strerror}); name another --port") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def crawl_site(work: Path, port: int) -> Path:
    """Crawl the server with wget into a WARC file, once."""
    archive = work / "pages.warc.gz"
    if archive.exists():
        return archive
    began = time.monotonic()
    scratch = work / "wget"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = ["wget", "--no-verbose", "--recursive", "--level=inf", "--accept=html,htm", "--no-directories"]
    command += ["--delete-after", "--warc-file=pages", "--no-warc-keep-log", "--no-warc-digests"]
    result = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/"], cwd=scratch, capture_output=True, text=True, check=False
    )
    if result.returncode not in (0, 8):  # 8: a link led nowhere, as links do
        raise UsageError(f"wget ended with code {result.returncode}: {result.stderr[-300:]}")
    (scratch / "pages.warc.gz").replace(archive)
    shutil.rmtree(scratch)
    print(f"crawled {archive.stat().st_size / 1e6:.1f} MB of pages in {time.monotonic() - began:.0f} s")
    return archive


def train(demo: CurateDemo, shards: Path) -> None:
    """A short run on the shards: what was made can be learned from."""
    tokenizer = demo.work / "tokenizer"
    if not tokenizer.exists():
        train_bpe(load_dataset(shards).captions, VOCAB_SIZE, CONTEXT_LENGTH).save(tokenizer)
    preset = get_preset("ViT-Ti-16")
    vision = replace(preset.vision, image_size=64, layers=4)
    text = replace(preset.text, vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, layers=4)
    config = TrainConfig(
        model=replace(preset, vision=vision, text=text),
        data=(SourceConfig(path=shards),),
        out=demo.work / "training",
        tokenizer=tokenizer,
        loader=LoaderConfig(batch_size=32),
        optim=OptimConfig(lr=1e-3, warmup=5),
        run=RunConfig(steps=demo.steps, checkpoint_every=demo.steps),
    )
    print_train_report(train_with_progress(config))


def _run(*command: str, where: Path) -> None:
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UsageError(f"{' '.join(command[:3])} failed: {result.stderr.strip()[-300:]}")


if __name__ == "__main__":
    with exit_on_error():
        main(tyro.cli(CurateDemo, description=__doc__))
