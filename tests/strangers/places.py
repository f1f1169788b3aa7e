"""Where commands read what users name: for each, a command that is sound but for one file, which a case puts there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from strangers.case import World
from strangers.world import EVALUATE, FINETUNE, copy

FAST = ["--precision", "float32", "--json"]
ONE = ["--processes", "1"]


@dataclass(frozen=True)
class Place:
    """A command and the file that it is to meet."""

    file: str
    arguments: list[str]
    needs: tuple[str, ...] = ("model",)
    """Sound things beside it; if the file is among or below them, it is replaced."""
    holds: str = ""
    """What kind of file it is, where the sound one is worth spoiling."""

    def make(self, world: World, put: Callable[[Path, bytes], None]) -> Callable[[Path], list[str]]:
        """`put` is given where the file belongs, and the content of the sound one."""

        def build(folder: Path) -> list[str]:
            copy(world, folder, *self.needs)
            path = folder / self.file
            path.parent.mkdir(parents=True, exist_ok=True)
            sound = path.read_bytes() if path.is_file() else b""
            path.unlink(missing_ok=True)
            put(path, sound)
            return self.arguments

        return build


def embed(*inputs: str) -> list[str]:
    return ["embed", "model", *inputs, "--out", "out", *FAST]


def classify(*more: str) -> list[str]:
    return ["classify", "set", "--labels", "a", "b", "--model", "model", *more]


PLACES: dict[str, Place] = {
    "classify a picture": Place("x.jpg", ["classify", "x.jpg", "--labels", "a", "b", "--model", "model"]),
    "classify a folder": Place("set/a/x.jpg", classify(), ("model", "set")),
    "classify by a file of labels": Place(
        "labels.txt",
        [*classify()[:2], "--labels", "@labels.txt", "--model", "model"],
        ("model", "set", "labels.txt"),
        "text",
    ),
    "classify with a model": Place("model", classify(), ("set",)),
    "classify with weights": Place("model/model.safetensors", classify(), ("model", "set"), "weights"),
    "embed a picture": Place("x.jpg", embed("x.jpg")),
    "embed a folder": Place("set/a/x.jpg", embed("set"), ("model", "set")),
    "embed a tar": Place("foreign.tar", embed("foreign.tar"), ("model", "foreign.tar"), "tar"),
    "embed captions of a tar": Place(
        "foreign.tar", embed("foreign.tar", "--kind", "text"), ("model", "foreign.tar"), "tar"
    ),
    "embed lines": Place("texts.txt", embed("texts.txt"), ("model", "texts.txt"), "text"),
    "embed a column": Place("table.parquet", embed("table.parquet:image"), ("model", "table.parquet"), "parquet"),
    "train on a tar": Place("foreign.tar", [*FINETUNE, "--data", "foreign.tar"], ("model", "foreign.tar"), "tar"),
    "train on shards": Place("shards/00000.tar", [*FINETUNE, "--data", "shards"], ("model", "shards"), "tar"),
    "train on shards with an index": Place(
        "shards/00000.arrow", [*FINETUNE, "--data", "shards"], ("model", "shards"), "arrow"
    ),
    "evaluate a suite": Place("mine.toml", EVALUATE, ("model", "set", "mine.toml"), "toml"),
    "evaluate a folder": Place("set/a/x.jpg", EVALUATE, ("model", "set", "mine.toml")),
    "evaluate a table": Place(
        "table.parquet",
        ["evaluate", "--model", "model", "--suite", "table.toml", "--out", "results"],
        ("model", "table.parquet", "table.toml"),
        "parquet",
    ),
    "evaluate a CSV": Place(
        "table.csv",
        ["evaluate", "--model", "model", "--suite", "csv.toml", "--out", "results"],
        ("model", "set", "table.csv", "csv.toml"),
        "text",
    ),
    "inspect weights": Place("x.pt", ["inspect", "x.pt"], ()),
    "verify weights": Place("model/model.safetensors", ["verify", "model"], ("model",), "weights"),
    "convert a tokenizer": Place(
        "model/diptych_tokenizer.json", ["convert", "model", "out", "--to", "transformers"], ("model",), "json"
    ),
    "report results": Place("results/x.json", ["report", "results", "--json"], ("results",)),
    "curate pages": Place(
        "pages.warc", ["curate", "crawl", "--inputs", "pages.warc", "--out", "out", *ONE], ("pages.warc",), "warc"
    ),
    "curate a list": Place(
        "list.txt", ["curate", "queries", "--lists", "list.txt", "--out", "out"], ("list.txt",), "text"
    ),
    "curate a corpus": Place(
        "list.txt",
        ["curate", "queries", "--corpus", "list.txt", "--out", "out", "--processes", "0"],
        ("list.txt",),
        "text",
    ),
    "curate page views": Place(
        "list.txt",
        ["curate", "queries", "--pageviews", "list.txt", "--out", "out", "--processes", "0"],
        ("list.txt",),
        "text",
    ),
    "curate by queries": Place(
        "queries/queries.parquet",
        ["curate", "match", "--pairs", "filter", "--queries", "queries", "--out", "out", *ONE],
        ("queries", "filter"),
        "parquet",
    ),
    "curate a part": Place(
        "crawl/part-00000.parquet",
        ["curate", "filter", "--folder", "crawl", "--out", "out", *ONE],
        ("crawl",),
        "parquet",
    ),
    "curate by settings": Place(
        "s.toml",
        [
            "curate",
            "run",
            "--work",
            "w",
            "--inputs",
            "pages.warc",
            "--queries",
            "queries",
            "--contact",
            "https://one.test/",
            "--settings",
            "s.toml",
        ],
        ("queries", "pages.warc", "s.toml"),
        "toml",
    ),
    "delete by a list": Place("keys.txt", ["curate", "delete", "shards", "--from", "keys.txt"], ("shards",), "text"),
    "contamination of a tar": Place(
        "foreign.tar",
        ["curate", "contamination", "--data", "shards", "--against", "foreign.tar", "--out", "out", *ONE],
        ("shards", "foreign.tar"),
        "tar",
    ),
}
