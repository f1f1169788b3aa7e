"""Names that steer terminals, are markup, no UTF-8, too long, options, or lead out: wherever a name is given or found."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from samples import write_tar
from strangers.case import Case, World, refused_or_right
from strangers.places import embed
from strangers.world import EVALUATE, FINETUNE, JPEG, copy

KIND = "names"
NAMES = {
    "escapes": "a\x1b]0;PWNED\x07\x1b[2J",
    "eight-bit escapes": "a\x9b31m",
    "markup": "[bold]a[",
    "markup that closes": "[\u2215red] [INST]",
    "from right to left": "\u202egpj.a",
    "not UTF-8": os.fsdecode(b"a\xff\xfe"),
    "lines": "a\nb\rc",
    "250 bytes": "x" * 250,
    "an option": "--help",
    "a dash": "-",
    "a private sign": "\uf022",
    "an emoji of several": "👩‍🔬",
    "accents by themselves": "e\u0301" * 40,
    "braces": "{00000..00003}",
    "a glob": "[a-z]*?",
    "a colon": "a:b",
    "an at": "a@0.5",
    "an equals": "a=b",
    "spaces": "  a  ",
    "a percent sign": "%s%n{}",
    "a null device": "NUL",
    "train": "train station",
}


def file_in_folder(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "set", "model")
    (folder / "set/a" / f"{name[:200]}.jpg").write_bytes(JPEG)
    (folder / "set/a" / f"{name[:200]}.png").write_bytes(b"broken")
    return ["classify", "set", "--labels", "a", "b", "--model", "model"]


def class_folder(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "set", "model", "mine.toml")
    (folder / "set" / name).mkdir()
    (folder / "set" / name / "x.jpg").write_bytes(JPEG)
    (folder / "set" / name / "y.jpg").write_bytes(b"broken")
    return EVALUATE[:-1]


def model_folder(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "model", "set")
    (folder / "model").rename(folder / name)
    return ["inspect", f"./{name}"]


def out_folder(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "model", "set")
    return ["embed", "model", "set", "--out", f"./{name}", "--precision", "float32", "--format", "arrow"]


def run_folder(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "model", "shards")
    return ["finetune", "model", "--data", "shards", "--out", f"./{name}", *FINETUNE[4:]]


def label(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "model", "set")
    (folder / "labels.txt").write_bytes(os.fsencode(name) + b"\nother\n")
    return ["classify", "set", "--labels", "@labels.txt", "--model", "model"]


def member(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "model")
    write_tar(
        folder / "a.tar", [(f"{name}.jpg", JPEG), (f"{name}.txt", b"x"), (f"{name}2.jpg", b"broken"), ("b.jpg", JPEG)]
    )
    return embed("a.tar")


def column(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "model")
    shown = name.encode("utf-8", "replace").decode()
    pq.write_table(pa.table({shown: [JPEG], "other": ["x"]}), folder / "t.parquet")
    return embed(f"t.parquet:{shown}")


def missing(world: World, name: str, folder: Path) -> list[str]:
    copy(world, folder, "model")
    return ["classify", f"./{name}.jpg", "--labels", name, "b", "--model", f"./{name}"]


def command(world: World, name: str, folder: Path) -> list[str]:
    return [name, "x"]


WHERE: dict[str, Callable[[World, str, Path], list[str]]] = {
    "classify a file called": file_in_folder,
    "embed a file called": lambda world, name, folder: (file_in_folder(world, name, folder), embed("set"))[1],
    "evaluate a class called": class_folder,
    "inspect a model called": model_folder,
    "embed into a folder called": out_folder,
    "train into a folder called": run_folder,
    "a label called": label,
    "embed a member called": member,
    "embed a column called": column,
    "what is not there, called": missing,
    "a command called": command,
}


def iter_cases(world: World) -> Iterator[Case]:
    for where, build in WHERE.items():
        for what, name in NAMES.items():
            check = None if build is command else refused_or_right
            yield Case(KIND, f"{where}: {what}", partial(build, world, name), check=check)
