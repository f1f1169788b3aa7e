"""Every file that a command reads back, spoilt as a whole and value by value, before the same command goes on."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from strangers.case import Case, World, damage_bytes, damage_json, damage_values, refused_or_right
from strangers.world import EMBED, EVALUATE, FINETUNE, STAGES, copy, iter_files

KIND = "files that are read back"
ONE = ["--processes", "1"]
READERS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "model": ((), ["inspect", "model"]),
    "open_clip": ((), ["inspect", "open_clip"]),
    "transformers": ((), ["inspect", "transformers", "--activation", "quick_gelu"]),
    "features": (("model", "set"), EMBED),
    "results": (("model", "set", "mine.toml"), EVALUATE),
    "shards": (("model",), [*FINETUNE, "--data", "shards"]),
    "run": (("model", "shards"), [*FINETUNE[:5], "4", *FINETUNE[6:], "--data", "shards"]),
    "queries": (("filter",), ["curate", "match", "--pairs", "filter", "--queries", "queries", "--out", "again", *ONE]),
    "crawl": (("pages.warc",), ["curate", "crawl", *STAGES["crawl"], *ONE]),
    "match": (("queries",), ["curate", "balance", "--pairs", "match", "--queries", "queries", "--out", "out", *ONE]),
}
"""Folder -> what else its reader needs, and the reader."""


def iter_cases(world: World, wholes: int = 6, values: int = 3, seeds: int = 1) -> Iterator[Case]:
    """Of the ways to spoil a file some are drawn for each; all of them occur over the files."""
    for folder, (needs, arguments) in READERS.items():
        for name in iter_files(world, folder):
            data = (world.root / name).read_bytes()
            spoilt = []
            draws = random.Random(name)
            if name.endswith(".json"):
                spoilt = [*draws.sample([*damage_json(data)], wholes), *damage_values(data, draws, values)]
            elif name.endswith(".jsonl"):
                for what, line in draws.sample([*damage_json(data.splitlines()[0] if data else b"{}")], wholes):
                    spoilt.append((f"a line {what}", line + b"\n" + data))
            if data:
                spoilt += [(f"random damage {seed}", damage_bytes(data, draws)) for seed in range(seeds)]
            for what, content in spoilt:
                make = partial(_spoil, world, (folder, *needs), name, content, arguments)
                yield Case(KIND, f"{name}: {what}", make, check=refused_or_right)
        for what in ("leftovers of others", "a folder for each file"):
            yield Case(KIND, f"{folder}: {what}", partial(_strange, world, (folder, *needs), folder, what, arguments))


def _spoil(
    world: World, needs: tuple[str, ...], name: str, data: bytes, arguments: list[str], folder: Path
) -> list[str]:
    copy(world, folder, *needs)
    (folder / name).write_bytes(data)
    return arguments


def _strange(
    world: World, needs: tuple[str, ...], own: str, what: str, arguments: list[str], folder: Path
) -> list[str]:
    copy(world, folder, *needs)
    if what == "a folder for each file":
        for path in [path for path in (folder / own).rglob("*.json") if path.is_file()]:
            path.unlink()
            path.mkdir()
        return arguments
    (folder / own / ".x.0123456789abcdef.tmp").symlink_to("../../beside")
    (folder / own / ".thesis.tmp").write_text("mine")
    (folder / own / "notes.txt").write_text("mine")
    return arguments
