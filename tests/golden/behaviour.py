"""What diptych does, as one file of hashes and numbers: run it before and after code was moved, and compare.

    python tests/golden/behaviour.py before.json [--workdir DIR] [--only tokens curation ...]

It uses only what stays where it is: the command line, `import diptych` and `python -m recipes.datasets`. Everything
else is made here, from numpy's and random's seeds: texts, pictures, archives, a web server on loopback (PORT must be
free: it is part of the pairs' keys). Numbers are those of one machine and one environment, so both files must come
from the same.
Clocks, speeds and paths are left out. A section that fails is told in the file, and in the exit code.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import runpy
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures"
PORT = 18733
HOST = f"127.0.0.1:{PORT}"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
    "OMP_NUM_THREADS": "1",  # sums in one order
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "100",
    "TERM": "dumb",
    "NO_COLOR": "1",
}
os.environ |= ENVIRONMENT
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import diptych  # noqa: E402

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "gray", "brown")
SHAPES = ("circle", "square", "bar", "cross", "ring", "corner")
PLACES = {"v1": FIXTURES / "checkpoint_v1"} | {
    path.name: path / "model.pt" if (path / "model.pt").exists() else path
    for path in sorted((FIXTURES / "checkpoints").iterdir())
    if path.is_dir()
}
"""Checkpoints that were written before."""
MODEL = PLACES["open_clip_vit"]
TEXTS = ["a cat", "a photo of the red circle", "", "Ünïcode — and “quotes”", "the the the " * 30, "🙂 two dogs!"]
LAYOUTS = ("diptych", "open_clip", "transformers", "openai", "onnx")
HELPS = ["", "train", "finetune", "wise-ft", "plan", "curate", "classify", "embed", "evaluate", "report", "inspect"]
HELPS += ["convert", "verify", "train ViT-B-16 --recipe paper", "train ViT-Ti-16 --recipe small-data"]
CURATE = ["queries", "crawl", "filter", "distinct", "match", "balance", "fetch", "pictures", "write", "run"]
HELPS += [f"curate {name}" for name in [*CURATE, "delete", "contamination"]]


# Hashes, and what is left out of them


def sha(data: bytes | str) -> str:
    """SHA-256 of bytes or text."""
    return hashlib.sha256(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data).hexdigest()


def sha_numbers(numbers: Any) -> str:
    """SHA-256 of an array or a tensor, with its type and shape."""
    if isinstance(numbers, torch.Tensor):
        name, numbers = str(numbers.dtype), numbers.detach().cpu().contiguous()
        return sha(f"{name} {list(numbers.shape)} ".encode() + numbers.flatten().view(torch.uint8).numpy().tobytes())
    return sha(f"{numbers.dtype} {list(numbers.shape)} ".encode() + np.ascontiguousarray(numbers).tobytes())


def sha_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """How many tensors there are, and one hash of their names and values."""
    lines = [f"{name} {sha_numbers(tensors[name])}" for name in sorted(tensors)]
    return {"tensors": len(lines), "sha256": sha("\n".join(lines))}


def show(numbers: Any) -> dict[str, Any]:
    """A few numbers to look at, and the hash of all."""
    flat = numbers.detach().float().flatten().tolist()
    return {"shape": list(numbers.shape), "some": [round(one, 5) for one in flat[:4]], "sha256": sha_numbers(numbers)}


def tree(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below a folder, or of the file alone."""
    return {
        str(path.relative_to(folder)): sha(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def tidy(text: str, work: Path) -> str:
    """What was printed without paths, durations and speeds."""
    text = text.replace(str(work), "WORK").replace(str(ROOT), "ROOT")
    text = re.sub(r'("seconds": |, )[\d.]+(?=[,}]| s\b)', r"\1#", text)
    return re.sub(r"\b[\d,.]+ s\b", "# s", text)


def lines_of(path: Path) -> list[Any]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# Commands


def run(work: Path, *arguments: object, module: str = "diptych") -> dict[str, Any]:
    """A command in a process of its own: exit code and what it printed (of errors only our own lines)."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | {"DIPTYCH_CACHE": str(work / "cache")}
    ended = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    return _ended(ended.returncode, ended.stdout, ended.stderr, work)


def run_here(work: Path, *arguments: object) -> dict[str, Any]:
    """`run` in this process, which spares loading PyTorch; for commands that draw nothing and start nothing."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["diptych", *map(str, arguments)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("diptych", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before
    return _ended(code, out.getvalue(), err.getvalue(), work)


def _ended(code: Any, out: str, err: str, work: Path) -> dict[str, Any]:
    if "Traceback" in err:
        raise RuntimeError(err[-2000:])
    errors = [line for line in err.splitlines() if "diptych: " in line or "skipped" in line]
    return {"code": code, "out": tidy(out, work).splitlines(), "errors": tidy("\n".join(errors), work).splitlines()}


def must(ended: dict[str, Any], *codes: int) -> dict[str, Any]:
    """The same, if it ended as it should."""
    if ended["code"] not in (codes or (0,)):
        raise RuntimeError(f"ended with {ended['code']}: {ended['errors'] or ended['out'][-5:]}")
    return ended


# Texts and pictures


def hostile_texts(count: int = 300) -> list[str]:
    """Texts of every kind of character, entity, contraction and breakage, and special tokens written out."""
    draw = random.Random(0)
    pieces = ["don't", "we'll'd", "ſ", "'S", "<start_of_text>", "<end_of_text>", "&amp;amp;", "&lt;b&gt;", "&#x1F600;"]
    pieces += ["sch\u00f6n", "scho\u0308n", "ﬁ", "\u200b", "\ufeff", "\u2028", "\t\n\r\v", "\x1b[31m", "\x00", "\u0345"]
    pieces += [
        "日本語",
        "한국어",
        "العربية",
        "हिन्दी",
        "👩‍👩‍👧",
        "İSTANBUL",
        "ß",
        "ﷺ",
        "１２３",
        "½",
        "x²",
        "æ—",
        "Ã©",
        "â€œ",
    ]
    pieces += [
        "1234567890",
        "a" * 200,
        "...!!!???",
        "http://a.b/c?d=e&f",
        "C++",
        "snake_case",
        "   ",
        "\ud800",
        "Ⅷ",
        "ǅ",
    ]
    texts = ["", " ", *pieces]
    while len(texts) < count:
        some = [draw.choice(pieces) for _ in range(draw.randint(1, 12))]
        some += ["".join(chr(draw.randrange(1, 0x3000)) for _ in range(draw.randint(1, 20)))]
        some += ["".join(chr(draw.randrange(32, 127)) for _ in range(draw.randint(1, 30)))]
        draw.shuffle(some)
        texts.append(draw.choice(["", " "]).join(some))
    return texts


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 92} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def waves(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Waves with some noise: neither flat nor all edges."""
    y, x = np.mgrid[0:height, 0:width]
    found = [np.sin(x / (5 + 2 * c + seed % 7) + c) * np.cos(y / (7 + c + seed % 5)) for c in range(channels)]
    noise = np.random.default_rng(seed).normal(0, 3, (height, width, channels))
    return Image.fromarray((127 + 90 * np.stack(found, axis=-1) + noise).clip(0, 255).astype(np.uint8).squeeze())


def draw_shape(colour: str, shape: str, size: int = 40) -> Image.Image:
    """A coloured shape on white."""
    image = Image.new("RGB", (size, size), "white")
    pen, a, b = ImageDraw.Draw(image), size // 8, size - size // 8
    match shape:
        case "circle":
            pen.ellipse((a, a, b, b), fill=colour)
        case "square":
            pen.rectangle((a, a, b, b), fill=colour)
        case "bar":
            pen.rectangle((0, 3 * a, size, 5 * a), fill=colour)
        case "cross":
            pen.rectangle((0, 3 * a, size, 5 * a), fill=colour)
            pen.rectangle((3 * a, 0, 5 * a, size), fill=colour)
        case "ring":
            pen.ellipse((a, a, b, b), outline=colour, width=a)
        case "corner":
            pen.polygon([(0, 0), (size, 0), (0, size)], fill=colour)
    return image


@functools.cache
def odd_pictures() -> dict[str, bytes]:
    """Pictures of every kind that is decoded or resized differently, and some that are none."""
    rgb, rgba, grey = waves(75, 51), waves(75, 51, 4), waves(75, 51, 1)
    exif, palette, numbers = Image.Exif(), rgb.quantize(64), np.asarray(grey)
    exif[0x0112] = 6  # turned by 90 degrees
    sizes = [(37, 53), (224, 225), (320, 239), (1, 300), (300, 7), (20, 20)]
    good = {f"rgb {w}x{h}": encode(waves(w, h)) for w, h in sizes} | {
        "rgba": encode(rgba),
        "palette": encode(palette),
        "palette, one transparent": encode(palette, transparency=3),
        "palette, transparency by entry": encode(palette, transparency=bytes(range(64))),
        "grey": encode(grey),
        "grey with alpha": encode(Image.merge("LA", [grey, grey.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])),
        "black and white": encode(grey.convert("1")),
        "16 bits": encode(Image.fromarray(numbers.astype(np.uint16) * 257)),
        "float TIFF": encode(Image.fromarray(numbers.astype(np.float32) * 1.5 - 20), "TIFF"),
        "CMYK JPEG": encode(rgb.convert("CMYK"), "JPEG"),
        "progressive JPEG": encode(rgb, "JPEG", progressive=True),
        "large JPEG": encode(waves(901, 700), "JPEG"),
        "grey JPEG": encode(grey, "JPEG"),
        "turned by EXIF": encode(rgb, "JPEG", exif=exif),
        "GIF": encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        "WEBP": encode(rgba, "WEBP", lossless=True),
        "BMP": encode(rgb, "BMP"),
    }
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    broken = {"empty": b"", "page": b"<html>not found</html>", "bomb": bomb, "cut off": good["large JPEG"][:900]}
    return good | broken | {"cut PNG": good["rgba"][:300]}


def write_pictures(folder: Path) -> Path:
    """The odd pictures and a folder below it, as files that end as they should or not."""
    (folder / "below").mkdir(parents=True)
    for number, (name, data) in enumerate(sorted(odd_pictures().items())):
        (folder / f"{number:02d} {name.replace(',', '')}.{'png' if number % 2 else 'jpg'}").write_bytes(data)
    (folder / "below/deep.png").write_bytes(encode(draw_shape("red", "ring")))
    (folder / "notes.md").write_text("no picture")
    return folder


def write_shapes(folder: Path, *, broken: int = 2, per_shard: int = 17) -> dict[str, Any]:
    """Shards of all shapes, with labels, by `diptych.write_shards`; a few cannot be used, or written."""
    pairs = [
        SimpleNamespace(key=f"{c}-{s}", caption=f"a {c} {s}", image=encode(draw_shape(c, s), f), details={"label": s})
        for c in COLOURS
        for s, f in zip(SHAPES, ("JPEG", "PNG", "WEBP", "GIF", "BMP", "JPEG"), strict=True)
    ]
    for number in range(broken):
        bad = {"key": f"broken{number}", "caption": "a broken one", "image": pairs[0].image[: 300 + number]}
        pairs.insert(7 * number + 3, SimpleNamespace(**bad, details={"label": "circle"}))
    first = vars(pairs[0])
    odd = [{}, {"key": "a/b"}, {"key": "k", "caption": " "}, {"key": "k", "image": b""}, {"key": "k", "image": b"?"}]
    pairs += [SimpleNamespace(**first | change) for change in odd]
    return dataclasses.asdict(diptych.write_shards(pairs, folder, samples_per_shard=per_shard))


# Sections


def tokens(work: Path) -> Any:
    """Token ids of hostile texts, in several lengths, by the stock vocabulary and one of its own."""
    texts, found = hostile_texts(), {}
    small = diptych.Tokenizer(("t h", "th e</w>", "c a", "ca t</w>", "a n", "an d</w>"), context_length=16)
    for special in ("escape", "parse"):
        stock = diptych.Tokenizer.clip(77, special)
        for length in (3, 16, 77, 333):
            found[f"{special} {length}"] = sha_numbers(stock(texts, length))
        ids = [stock.encode(text) for text in texts]
        found[f"{special} ids"] = sha(json.dumps(ids))
        found[f"{special} decoded"] = sha(json.dumps([stock.decode(one) for one in ids]))
        found[f"{special} fingerprint"] = stock.fingerprint
    batch = small.encode_batch(texts)
    found["small"] = {"sha256": sha_numbers(small(texts)), "truncated": batch.truncated, "saved": ""}
    found["small"]["saved"] = sha(small.save(work / "tokenizer").read_bytes())
    try:
        small(texts, truncate=False)
    except ValueError as error:
        found["too long"] = f"{type(error).__name__}: {error}"
    return found


def preprocessing(work: Path) -> Any:
    """Pixels of every kind of picture by three recipes, and why some cannot be used."""
    recipes = [{"image_size": 32}, {"image_size": 57, "resize": "squash", "interpolation": "bilinear"}]
    prepares = [diptych.Preprocess(**recipe) for recipe in [*recipes, {"image_size": 224}]]
    found: dict[str, Any] = {}
    for name, data in odd_pictures().items():
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            found[name] = [sha_numbers(prepare(image)) for prepare in prepares]
            found[name] += [sha_numbers(prepare.pixels(image)) for prepare in prepares]
        except Exception as error:
            found[name] = f"Pillow: {type(error).__name__}"
        for prepare in prepares:
            with contextlib.suppress(diptych.DiptychError, ZeroDivisionError):
                found.setdefault(f"{name}, quickly", []).append(sha_numbers(prepare.quick_pixels(data)))
    return found


def library(work: Path) -> Any:
    """Presets, how weights begin, the loss and its derivatives, a zero-shot classifier, why pictures are refused."""
    presets = {name: sha(json.dumps(dataclasses.asdict(config))) for name, config in sorted(diptych.PRESETS.items())}
    found: dict[str, Any] = {"presets": presets, "templates": {}, "weights": {}, "refused": {}}
    for name in ("simple", "imagenet_7", "imagenet_80", "none"):
        found["templates"][name] = sha(json.dumps(diptych.load_templates(name)))
    for name in ("ViT-Ti-16", "ViT-Ti-16-conv", "RN-Ti"):
        torch.manual_seed(0)
        found["weights"][name] = sha_tensors(diptych.CLIP(diptych.PRESETS[name]).state_dict())
    a, b = (
        torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(i))) for i in (1, 2)
    )
    for groups in (None, torch.arange(12) // 2):
        x, y, scale = a.clone().requires_grad_(), b.clone().requires_grad_(), torch.tensor(9.0, requires_grad=True)
        diptych.clip_loss(x, y, scale, groups=groups).backward()
        found[f"loss of {'alone' if groups is None else 'groups'}"] = [show(one.grad) for one in (x, y, scale)]
    loaded = diptych.load(MODEL)
    classifier = diptych.ZeroShotClassifier(loaded, ["cat", ["red circle", "ring"], "dog"], ["a {}.", "one {}"])
    good = [data for name, data in odd_pictures().items() if name.startswith("rgb")][:3]
    found["probabilities"] = show(torch.from_numpy(classifier.predict_proba(good)))
    found["labels"] = classifier.predict(good).tolist()
    for name, data in odd_pictures().items():
        try:
            diptych.embed_images(loaded, [data])
        except diptych.DiptychError as error:
            found["refused"][name] = f"{type(error).__name__}: {error}"
    return found


def checkpoints(work: Path) -> Any:
    """Earlier checkpoints: what they compute, what is said of them, and what they become in every layout."""
    found = {}
    pictures = [encode(waves(50 + 3 * i, 60, seed=i), "JPEG" if i % 2 else "PNG") for i in range(5)]
    for name, place in PLACES.items():
        loaded = diptych.load(place)
        about = found[name] = {"weights": sha_tensors(loaded.model.state_dict())}
        for precision in ("exact", "float32", "bfloat16"):
            about[f"pictures {precision}"] = show(diptych.embed_images(loaded, pictures, precision=precision))
            about[f"texts {precision}"] = show(diptych.embed_texts(loaded, TEXTS, precision=precision))
        about["inspect"] = must(run_here(work, "inspect", place))["out"]
        about["inspect --json"] = must(run_here(work, "inspect", place, "--json"))["out"]
        about["verify"] = must(run_here(work, "verify", place))["out"]
        for layout in LAYOUTS:
            about[f"to {layout}"] = convert(work, place, work / f"{name}-{layout}", "--to", layout)
    changes = ["--to", "diptych", "--image-size", 64, "--context-length", 9, "--precision", "float16"]
    found["changed"] = convert(work, MODEL, work / "changed", *changes)
    diptych.save(diptych.load(work / "changed"), work / "again", "diptych")
    found["saved"] = read_checkpoint(work / "again")
    return found


def convert(work: Path, place: Path, out: Path, *arguments: object) -> dict[str, Any]:
    """`diptych convert`, and what it wrote."""
    ended = must(run_here(work, "convert", place, out, *arguments), 0, 2)
    rounded = [re.sub(r"\d\.\de-\d\d", "#e-##", line) for line in ended["out"] if not line.startswith("[")]
    return {**ended, "out": rounded} | ({"written": read_checkpoint(out)} if ended["code"] == 0 else {})


def read_checkpoint(place: Path) -> dict[str, Any]:
    """Every file of a checkpoint: tensors of those that hold tensors, else the bytes."""
    found: dict[str, Any] = {}
    for path in [place] if place.is_file() else sorted(place.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = sha_tensors(load_file(path))
        elif path.suffix == ".onnx":
            found[path.name] = read_onnx(path)
        elif path.is_file() and (path == place or path.suffix in (".pt", ".bin")):
            found["weights"] = sha_tensors(torch.load(path, weights_only=True, map_location="cpu"))
        else:
            found[path.name] = sha(path.read_bytes())
    return found


def read_onnx(path: Path) -> dict[str, Any]:
    """Constants by content and operations by name; names of values and traces of the source are left out."""
    import onnx

    graph = onnx.load(path).graph
    constants = sorted(sha_numbers(onnx.numpy_helper.to_array(one)) for one in graph.initializer)
    faces = [one.name for one in (*graph.input, *graph.output)]
    return {
        "faces": faces,
        "constants": sha(" ".join(constants)),
        "nodes": sha(" ".join(n.op_type for n in graph.node)),
    }


def help_and_plan(work: Path) -> Any:
    """What is planned, the help of every command, and refusals of what cannot be."""
    found: dict[str, Any] = {"version": run_here(work, "--version"), "help": {}}
    for line in HELPS:
        ended = must(run_here(work, *line.split(), "--help"))
        found["help"][line] = sha("\n".join(ended["out"]))
    many = ["--devices", 64, "--sharding", "fsdp", "--recompute", "--json"]
    for name, more in (("ViT-B-32", []), ("RN50", ["--device-kind", "v100"]), ("ViT-L-14-336", many)):
        found[f"plan {name}"] = must(run_here(work, "plan", name, *more))
    wrong = ["compare", "plan ViT-B-33", "inspect nowhere", "train ViT-B-32 --data nowhere --out x", "classify x"]
    wrong += [
        "train ViT-B-32 --data x --out x --batch-size 0",
        "evaluate --model x --suite cifar11",
        "embed x y --out z",
    ]
    for line in wrong:
        found[line] = must(run_here(work, *line.split()), 2)
    return found


# Curation


def site() -> dict[str, tuple[int, dict[str, str], bytes]]:
    """What the web server answers, by path: pictures of every kind that fetching treats differently."""
    found: dict[str, tuple[int, dict[str, str], bytes]] = {}
    for number, colour in enumerate(COLOURS):
        for shape in SHAPES:
            picture = encode(draw_shape(colour, shape, 96 + 4 * number), "PNG" if shape == "ring" else "JPEG")
            found[f"/pictures/{colour}-{shape}"] = (200, {"Content-Type": "image/jpeg"}, picture)
    twin = Image.open(io.BytesIO(found["/pictures/red-circle"][2]))
    files = {
        "twin": encode(twin, "JPEG", quality=60),
        "copy": found["/pictures/blue-bar"][2],
        "page": b"<html>gone</html>",
    }
    files |= {"large": encode(waves(900, 700), "JPEG"), "small": encode(waves(20, 20)), "wide": encode(waves(400, 40))}
    files |= {"cut": encode(waves(200, 200), "JPEG")[:1500], "empty": b"", "grey": encode(waves(90, 80, 1), "JPEG")}
    files |= {"listed": encode(waves(70, 70, seed=5), "JPEG"), "alpha": encode(waves(64, 64, 4), "WEBP", lossless=True)}
    found |= {f"/odd/{name}": (200, {"Content-Type": "image/jpeg"}, data) for name, data in files.items()}
    found["/odd/moved"] = (301, {"Location": "/odd/grey2"}, b"")
    found["/odd/grey2"] = (200, {}, encode(waves(80, 90, 1, seed=3), "JPEG"))
    found["/odd/away"] = (302, {"Location": "http://127.0.0.2:1/x.jpg"}, b"")
    found["/odd/round"] = (302, {"Location": "/odd/round"}, b"")
    found["/odd/noai"] = (200, {"X-Robots-Tag": "noai"}, encode(waves(66, 66)))
    found["/odd/busy"] = (503, {}, b"")
    found["/odd/forbidden"] = (403, {}, b"")
    found["/private/a"] = (200, {}, encode(waves(66, 67)))
    found["/robots.txt"] = (200, {"Content-Type": "text/plain"}, b"User-agent: *\nDisallow: /private/\n")
    return found


class Handler(BaseHTTPRequestHandler):
    """Answers from `site`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answers = site()

    def do_GET(self) -> None:
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """The site at HOST until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def record(kind: str, url: str, block: bytes, content_type: str = "application/http; msgtype=response") -> bytes:
    """A WARC record."""
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"


def page(path: str, body: bytes, *headers: str, status: str = "200 OK", kind: str = "text/html") -> bytes:
    """A page of the site, as a crawler kept it."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
    return record("response", f"http://{HOST}/{path}", "\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def colour_pages() -> list[bytes]:
    """A page a colour: every shape, page furniture, file names, other languages, copies, dead addresses."""
    pages = []
    for colour in COLOURS:
        images = [f'<img src="/pictures/{colour}-{s}" alt="A {colour} {s} on a white background">' for s in SHAPES]
        images += [f'<img src="/pictures/{colour}-ring" title="The {colour} ring, seen   again &amp; again" width=9>']
        images += ['<img src="/pictures/logo" alt="click to enlarge">', '<img src="x.png" alt="IMG_0001.jpg">']
        images += [f'<img src="none-{colour}.jpg" alt="A {colour} picture that is not there any more">']
        images += [f'<img src="d.jpg" alt="Une image qui ne montre que des choses en {colour}">', '<img alt="nowhere">']
        pages.append(page(f"{colour}.html", f'<html lang="en"><meta charset="utf-8">{"".join(images)}'.encode()))
    return pages


def odd_pages() -> list[bytes]:
    """Charsets, encodings, ways to name a picture, opt-outs, and damaged records."""
    word = {"a": "café", "b": "кошка", "c": "猫"}
    tag = '<img src="/odd/{}" alt="A strange {} picture with a {} in it">'
    odd = "".join(tag.format(name, name, "circle") for name in sorted(p[5:] for p in site() if p.startswith("/odd/")))
    odd += (
        tag.format("../private/a", "private", "square") + '<img src="http://10.0.0.1/a.jpg" alt="an inner red square">'
    )
    ways = (
        f'<base href="http://{HOST}/pictures/"><img srcset="red-bar 1x, red-ring 2x" alt="The largest red ring of all">'
    )
    ways += '<img data-src="green-ring" src="data:image/gif;base64,R0" alt="A lazy green ring"><noscript>'
    ways += '<img src="blue-ring" alt="A blue ring without scripts"></noscript>'
    ways += '<figure><img src="gray-bar"><figcaption>A <b>gray</b> bar'
    ways += "</figcaption></figure><picture><source srcset=brown-bar><img alt='A brown bar of a source'></picture><!--"
    ways += '<img src="red-bar" alt="A hidden bar">--><template><img src="red-bar" alt="A hidden bar"></template>'
    body, latin = odd.encode(), tag.format("grey", word["a"], "bar").encode("latin-1")
    chunks = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    opt_out = b'<meta name="robots" content="noai">' + body
    found = [
        page("odd.html", body),
        page("ways.html", ways.encode()),
        page("latin.html", latin, kind="text/html; charset=iso-8859-1"),
        page("russian.html", tag.format("grey", word["b"], "bar").encode("cp1251"), kind="text/html; charset=cp1251"),
        page("sjis.html", b"<meta charset=shift_jis>" + tag.format("large", word["c"], "cross").encode("shift_jis")),
        page("utf16.html", tag.format("alpha", "wide", "bar").encode("utf-16")),
        page("unsaid.html", latin),
        page("packed.html", gzip.compress(body, mtime=0), "Content-Encoding: gzip"),
        page("chunked.html", chunks, "Transfer-Encoding: chunked"),
        page("torn.html", gzip.compress(body, mtime=0)[:60], "Content-Encoding: gzip"),
        page("meta.html", opt_out),
        page("header.html", body, "X-Robots-Tag: noindex"),
        page("gone.html", body, status="404 Not Found"),
        page("text.txt", body, kind="text/plain"),
        page("empty.html", b""),
        page("nothing.html", b"<p>no pictures"),
        record("request", f"http://{HOST}/", b"GET / HTTP/1.1\r\n\r\n"),
        record("response", "no address", b"HTTP/1.1 200 OK\r\n\r\n<img src=a alt=b>"),
        page("end.html", tag.format("grey", "last", "corner").encode()),
    ]
    return [*found, found[0]]


def wat_records() -> list[bytes]:
    """Links as Common Crawl's WAT files tell them; one that is no JSON."""
    links = [
        {"path": "IMG@/src", "url": f"/pictures/{c}-cross", "alt": f"the {c} cross of a wat file"} for c in COLOURS
    ]
    envelope = {"Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": {"Head": {}, "Links": links}}}}
    good = record(
        "metadata", f"http://{HOST}/wat.html", json.dumps({"Envelope": envelope}).encode(), "application/json"
    )
    return [good, record("metadata", f"http://{HOST}/bad.html", b"{", "application/json")]


def write_archives(folder: Path) -> list[Path]:
    """Four archives, the same bytes always: good, damaged in the middle, cut off at the end, and links."""
    folder.mkdir()
    packed = [[gzip.compress(one, mtime=0) for one in some] for some in (colour_pages(), odd_pages(), wat_records())]
    packed[1][9] = packed[1][9][:40] + bytes(8) + packed[1][9][48:]
    contents = {
        "a.warc.gz": b"".join(packed[0]),
        "b.warc.gz": b"".join(packed[1]),
        "d.warc.wat.gz": b"".join(packed[2]),
    }
    contents["c.warc"] = b"".join(colour_pages()[:3])[:-700]
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in sorted(contents)]


def stage(folder: Path) -> dict[str, Any]:
    """What a stage's manifest promises to be the same: its hash, its counts, the hashes of its files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: manifest[name] for name in ("hash", "parent", "rows", "kept", "dropped", "files")}


def curation(work: Path) -> Any:
    """Archives through every stage, other policies, deletion, and what an evaluation set shares with the shards."""
    archives, stages, queries = write_archives(work / "archives"), work / "stages", work / "queries"
    (work / "list.txt").write_text(
        "\n".join([*COLOURS, *SHAPES, "white background", "red circle", "unicorn", "picture"])
    )
    (work / "listed.txt").write_text(hashlib.md5(site()["/odd/listed"][2]).hexdigest() + "\n")
    settings = f'[filter]\nmin_words = 2\n[fetch]\nbackoff = 0.02\nknown_hashes = ["{work / "listed.txt"}"]\n'
    (work / "settings.toml").write_text(settings)
    one, found = ("--processes", 2), {"archives": tree(work / "archives")}
    few = ("--min-word-count", 2, "--min-bigram-count", 2, "--min-pmi", 1)
    told = must(run(work, "curate", "queries", "--out", queries, "--lists", work / "list.txt"))
    found["queries"] = {"out": told["out"], "tsv": sha((queries / "queries.tsv").read_bytes())}
    command = ["curate", "run", "--work", stages, "--inputs", *archives, "--queries", queries, "--limit", 12, *one]
    command += [
        "--contact",
        "https://example.org/behaviour",
        "--allow-host",
        HOST,
        "--settings",
        work / "settings.toml",
    ]
    with serving():
        must(run(work, *command))
    found["stages"] = {path.parent.name: stage(path.parent) for path in sorted(stages.glob("*/manifest.json"))}
    found["funnel"] = json.loads(tidy((stages / "funnel.json").read_text(), work))
    found["shards"] = {
        name: hash for name, hash in tree(stages / "shards").items() if not name.startswith(("done", "."))
    }
    for policy in ("metaclip", "assign"):
        out, listed = work / policy, queries / "queries.parquet"
        options = [
            "--pairs",
            stages / "match",
            "--queries",
            listed,
            "--out",
            out,
            "--policy",
            policy,
            "--limit",
            12,
            *one,
        ]
        found[policy] = [must(run(work, "curate", "balance", *options))["out"], stage(out)]
    options = ["--folder", stages / "fetch", "--out", work / "scored", "--model", MODEL, "--min-score", "0.0", *one]
    found["scored"] = [must(run(work, "curate", "pictures", *options))["code"], stage(work / "scored")["dropped"]]
    texts = ["--corpus", stages / "filter/part-*.parquet", "--out", work / "counted", *few]
    found["counted"] = [
        must(run(work, "curate", "queries", *texts))["out"],
        sha((work / "counted/queries.tsv").read_bytes()),
    ]
    copies = [
        "--data",
        stages / "shards",
        "--against",
        stages / "fetch",
        "--out",
        work / "copies",
        "--samples",
        20,
        *one,
    ]
    found["contamination"] = must(run(work, "curate", "contamination", *copies))["out"]
    gone = next(iter(diptych.load_dataset(stages / "shards").pairs)).key
    found["delete"] = must(run(work, "curate", "delete", stages / "shards", "--key", gone, "--compact"))["out"]
    found["left"] = diptych.load_dataset(stages / "shards").content_hash
    return found


# Models


def training(work: Path) -> Any:
    """Runs from scratch, of both kinds of tower and loss, with evaluations; fine-tuning; the models in between."""
    found = {"written": write_shapes(work / "shards"), "dataset": diptych.load_dataset(work / "shards").content_hash}
    found["shards"] = tree(work / "shards")
    diptych.Tokenizer(("r e", "a r", "b l", "c i", "c l", "e n</w>"), context_length=77).save(work / "tokenizer")
    asked = ["--evaluate", f"labels=zeroshot:{work / 'shards'}", f"captions=retrieval:{work / 'shards'}"]
    usual = ["--data", work / "shards", "--batch-size", 16, "--workers", 0, "--precision", "float32", "--device", "cpu"]
    scratch = [*usual, *asked, "--tokenizer", work / "tokenizer", "--evaluate-every", 6]
    runs: dict[str, tuple[object, ...]] = {
        "vit": ("train", "ViT-Ti-16", *scratch, "--steps", 12, "--lr", 1e-3, "--warmup", 2),
        "resnet": ("train", "RN-Ti", *scratch, "--steps", 4, "--loss", "siglip", "--warmup", 1),
        "micro": (
            "train",
            "ViT-Ti-16",
            *scratch,
            "--steps",
            3,
            "--warmup",
            1,
            "--micro-batch-size",
            5,
            "--positives",
            "caption",
        ),
        "locked": (
            "finetune",
            work / "vit",
            *usual,
            *asked,
            "--steps",
            4,
            "--warmup",
            1,
            "--lock",
            "image",
            "--cache-features",
            "on",
        ),
        "decayed": ("finetune", work / "vit", *usual, *asked, "--steps", 3, "--warmup", 1, "--layer-decay", 0.7),
    }
    for name, command in runs.items():
        augment = ["--no-augment"] if name == "locked" else []
        ended = must(run(work, *command, "--out", work / name, *augment))
        found[name] = {"out": ended["out"], "metrics": lines_of(work / name / "metrics.jsonl"), "model": {}}
        for step in sorted((work / name).glob("step_*")):
            files = {path.name: sha_tensors(load_file(path)) for path in sorted(step.glob("*.safetensors"))}
            found[name]["model"][step.name] = files | {
                "checkpoint.json": sha(tidy((step / "checkpoint.json").read_text(), work))
            }
    must(run(work, "wise-ft", work / "vit", work / "decayed", asked[0], asked[1], "--out", work / "wise"))
    found["wise-ft"] = json.loads(tidy((work / "wise/wise_ft.json").read_text(), work))
    return found


def evaluation(work: Path) -> Any:
    """Made datasets, datasets of one's own, every protocol that they allow; numbers, scores and what is said."""
    data = work / "data"
    made = must(run(work, data, "--names", "digits", "counting", "rendered_text", module="recipes.datasets"))
    found: dict[str, Any] = {"made": made["out"], "data": tree(data)}
    write_folders(work / "shapes")
    write_captions(work / "captions/test")
    (work / "shapes.toml").write_text("title = 'Shapes'\n[data]\npath = 'shapes'\n")
    (work / "captions.toml").write_text("title = 'Captions'\nkind = 'captions'\n[data]\npath = 'captions'\n")
    models = ["--model", f"vit={MODEL}", "--model", f"resnet={PLACES['torchscript_resnet']}"]
    usual = ["--data", data, "--out", work / "results", "--device", "cpu", "--seeds", 2, "--shots", 1, 2]
    many = ["--suite", work / "shapes.toml", work / "captions.toml", "digits"]
    many += ["--protocols", "zeroshot", "prompts", "retrieval", "probe", "fewshot"]
    found["many"] = must(run(work, "evaluate", *models, *usual, *many))["out"]
    quick = ["--suite", "made", "cifar10", "--protocols", "zeroshot", "--profile", "clip_benchmark"]
    other = ["--data", data, "--out", work / "quick", "--precision", "float32", "--device", "cpu", "--json"]
    ended = must(run(work, "evaluate", *models[:2], *quick, *other), 0, 1)
    found["quick"] = {"code": ended["code"], "errors": ended["errors"]}
    for path in sorted([*work.glob("results/*/**/*.*"), *work.glob("quick/*/**/*.*")]):
        if path.suffix == ".json":
            told = json.loads(path.read_text().replace(str(work), "WORK").replace(str(ROOT), "ROOT"))
            told.pop("about", None)  # versions, dates, sizes and times of files
            told.get("details", {}).pop("seconds", None)
            found[str(path.relative_to(work))] = told
        elif path.suffix == ".npz":
            found[str(path.relative_to(work))] = {name: sha_numbers(array) for name, array in np.load(path).items()}
    return found


def write_folders(folder: Path) -> None:
    """Shapes in class folders; a class has a picture that cannot be used."""
    for number, colour in enumerate(COLOURS):
        for shape in SHAPES[:4]:
            place = folder / ("train" if number < 5 else "test") / shape
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{colour}.jpg").write_bytes(encode(draw_shape(colour, shape), "JPEG"))
    (folder / "test/bar/broken.jpg").write_bytes(b"\xff\xd8\xff")


def write_captions(folder: Path) -> None:
    """Pictures with two captions each, as CLIP_benchmark keeps them."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for colour in COLOURS:
            for shape in SHAPES[:2]:
                lines = f"a {colour} {shape}\n{shape} in {colour}"
                for ending, content in (("txt", lines.encode()), ("jpg", encode(draw_shape(colour, shape), "JPEG"))):
                    info = tarfile.TarInfo(f"{colour}-{shape}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "nshards.txt").write_text("1\n")
    (folder.parent / "dataset_type.txt").write_text("retrieval")


def embedding(work: Path) -> Any:
    """Folders with broken pictures, shards and texts to features; `classify` on the same folder."""
    pictures = write_pictures(work / "pictures")
    write_shapes(work / "shards")
    (work / "texts.txt").write_bytes("\n".join([*TEXTS, "a\u2028b", "\ufeffc"]).encode() + b"\n\xff\xfe broken\r\nlast")
    jobs: dict[str, tuple[object, ...]] = {
        "folder": (pictures, "--precision", "float32"),
        "exact": (pictures, work / "shards", "--precision", "exact", "--part-rows", 7, "--format", "npy"),
        "shards": (work / "shards", "--precision", "bfloat16", "--dtype", "float16", "--batch-size", 5),
        "captions": (work / "shards", work / "texts.txt", "--kind", "text", "--precision", "float32"),
        "texts": (work / "texts.txt", "--precision", "exact", "--format", "arrow"),
    }
    found: dict[str, Any] = {}
    for name, (*inputs,) in jobs.items():
        out = work / f"features of {name}"
        ended = must(run(work, "embed", MODEL, *inputs, "--out", out, "--device", "cpu", "--json"), 0, 1)
        found[name] = {"code": ended["code"], "out": ended["out"], "rows": {}, "files": tree(out / "features")}
        for path in sorted(out.glob("features/*.parquet")):
            for row in pq.read_table(path).to_pylist():
                found[name]["rows"][row["id"]] = sha_numbers(np.array(row["feature"], np.float32))
        skipped = lines_of(out / "skipped.jsonl") if (out / "skipped.jsonl").exists() else []
        found[name]["skipped"] = [[one["id"], one["reason"]] for one in skipped]
        if name in ("exact", "texts"):  # parts have paths inside, these formats are read by name only
            found[name]["files"] = {key: value for key, value in found[name]["files"].items() if key.endswith(".npy")}
        if name in ("folder", "shards", "captions"):
            found[name].pop("files")
    labels = ["--labels", "red circle|ring", "cat", "bar", "--templates", "imagenet_7", "--json", "--device", "cpu"]
    found["classify"] = must(run(work, "classify", pictures, "--model", MODEL, *labels), 1)
    found["classify float32"] = must(
        run(work, "classify", pictures, "--model", MODEL, *labels, "--precision", "float32"), 1
    )
    return found


SECTIONS: tuple[Callable[[Path], Any], ...] = (
    tokens,
    preprocessing,
    library,
    help_and_plan,
    checkpoints,
    curation,
    training,
    evaluation,
    embedding,
)


def main() -> int:
    """Run the sections and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workdir", type=Path, help="an empty or new folder for what is made; kept")
    parser.add_argument("--only", nargs="+", choices=[section.__name__ for section in SECTIONS])
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        top = (given.workdir or Path(temporary)).resolve()
        os.environ["DIPTYCH_CACHE"] = str(top / "cache")
        for section in (one for one in SECTIONS if not given.only or one.__name__ in given.only):
            name, began = section.__name__, time.monotonic()
            (top / name).mkdir(parents=True)
            try:
                found[name] = section(top / name)
            except Exception as error:
                found[name] = {"failed": tidy(f"{type(error).__name__}: {error}", top / name)}
            failed = found[name].get("failed", "")
            print(f"{name:14} {time.monotonic() - began:5.1f} s  {failed}", file=sys.stderr, flush=True)
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=True) + "\n")
    return 1 if any("failed" in one for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
