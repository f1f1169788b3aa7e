"""Sound models, pictures, shards and results, made once by the commands themselves, which the cases then spoil."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from samples import TINY_VIT, draw, encode, make_loaded, small, write_samples, write_tar
from strangers.case import World

JPEG = encode(draw("red", "circle", 200))
FAST = ["--precision", "float32", "--device", "cpu"]
FINETUNE = ["finetune", "model", "--out", "run", "--steps", "2", "--batch-size", "4", "--workers", "0", *FAST]
EVALUATE = ["evaluate", "--model", "model", "--suite", "mine.toml", "--out", "results", "--json"]
EMBED = ["embed", "model", "set", "--out", "features", "--precision", "float32", "--json"]
STAGES = {
    "crawl": ["--inputs", "pages.warc", "--out", "crawl"],
    "filter": ["--folder", "crawl", "--out", "filter", "--languages"],
    "match": ["--pairs", "filter", "--queries", "queries", "--out", "match"],
}


def build(root: Path) -> World:
    """Everything, below `root`."""
    from archives import page  # tests/curate

    from diptych.checkpoint import layouts

    root.mkdir(parents=True)
    for name, config in (("model", small(TINY_VIT)), ("transformers", small(TINY_VIT)), ("open_clip", TINY_VIT)):
        layouts.save(make_loaded(config), root / name, layout="diptych" if name == "model" else name)
    for name in ("set/a/red.jpg", "set/a/two.jpg", "set/b/blue.jpg", "set/b/four.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(draw("blue" if "/b/" in name else "red", "circle", 60)))
    (root / "mine.toml").write_text("[data]\npath = 'set'\n")
    write_samples(root / "shards", count=16, samples_per_shard=8)
    write_tar(
        root / "foreign.tar", [(f"{i}.{s}", d) for i in range(8) for s, d in (("jpg", JPEG), ("txt", b"a red circle"))]
    )
    (root / "labels.txt").write_text("a red circle\na blue circle\n")
    (root / "texts.txt").write_text("a red circle\na blue square\n")
    pq.write_table(pa.table({"image": [JPEG] * 4, "label": [0, 1, 0, 1], "text": list("abcd")}), root / "table.parquet")
    (root / "table.csv").write_text("image,label\nset/a/red.jpg,a\nset/b/blue.jpg,b\n")
    (root / "table.toml").write_text("[data]\npath = 'table.parquet'\n")
    (root / "csv.toml").write_text("[data]\npath = 'table.csv'\n")
    (root / "s.toml").write_text("[crawl]\nfiles_per_task = 1\n")
    alts = "".join(f'<img src="{i}.jpg" alt="A photograph of a red circle number {i}">' for i in range(6))
    (root / "pages.warc").write_bytes(page("http://one.test/", f'<html lang="en"><title>t</title>{alts}'.encode()))
    (root / "list.txt").write_text("circle\nphotograph\n")
    run(root, EMBED)
    run(root, EVALUATE)
    run(root, [*FINETUNE, "--data", "shards"])
    run(root, ["curate", "queries", "--out", "queries", "--lists", "list.txt"])
    for stage, options in STAGES.items():
        run(root, ["curate", stage, *options, "--processes", "1"])
    shutil.rmtree(root / "cache", ignore_errors=True)
    return World(root)


def run(folder: Path, arguments: list[str]) -> None:
    """A command that has to end well."""
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        if status:
            raise RuntimeError(
                f"{arguments} ended with {os.waitstatus_to_exitcode(status)}:\n{(folder / 'log').read_text()}"
            )
        (folder / "log").unlink()
        return
    code = 70
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        os.environ.update(DIPTYCH_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        from diptych.cli import main

        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        try:
            main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def warm() -> None:
    """Import what commands import when they run, before cases are forked."""
    import torch

    torch.set_num_threads(1)  # a forked child has no other threads
    from PIL import Image

    import diptych.checkpoint.layouts
    import diptych.cli
    import diptych.curate.pipeline
    import diptych.curate.queries.build
    import diptych.embed.bulk.run
    import diptych.evaluate.run
    import diptych.shards.loader
    import diptych.train.finetune
    import diptych.train.loop
    import diptych.zeroshot  # noqa: F401

    Image.init()


def copy(world: World, folder: Path, *names: str) -> Path:
    """Copies of sound things in a case's folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (world.root / name).is_dir():
            shutil.copytree(world.root / name, folder / name, dirs_exist_ok=True, symlinks=True)
        else:
            shutil.copy2(world.root / name, folder / name)
    return folder


def iter_files(world: World, *folders: str) -> Iterator[str]:
    """Names of the files below, relative to the world."""
    for folder in folders:
        for path in sorted((world.root / folder).rglob("*")):
            if path.is_file():
                yield path.relative_to(world.root).as_posix()
