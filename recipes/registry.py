"""Hold the registry of datasets against where its lists come from, and say what differs.

    git clone https://github.com/openai/CLIP; git clone https://github.com/LAION-AI/CLIP_benchmark
    python -m recipes.registry CLIP CLIP_benchmark

Nothing is written: the TOML files in assets/datasets are what counts, this only tells when a source has changed.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from diptych.evaluate.datasets.registry import Dataset, known_datasets, load_dataset_entry

Lists = tuple[tuple[str, ...], ...]


def read_prompts(checkout: Path) -> dict[str, tuple[Lists, tuple[str, ...]]]:
    """Section of data/prompts.md -> its classes, each with all its names, and its templates."""
    text = (checkout / "data" / "prompts.md").read_text("utf-8")
    found = {}
    for title, body in re.findall(r"^## (.+?)\n+```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE):
        values = {
            name: ast.literal_eval(value) for name, value in re.findall(r"^(\w+) = (\[.*?^\])", body, re.S | re.M)
        }
        found[title] = _named(values["classes"]), tuple(values["templates"])
    return found


def read_notebook(checkout: Path) -> tuple[Lists, tuple[str, ...]]:
    """ImageNet's classes and templates."""
    notebook = json.loads((checkout / "notebooks" / "Prompt_Engineering_for_ImageNet.ipynb").read_text("utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    values = [re.search(rf"^{name} = (\[.*?\])\n", code, re.DOTALL | re.MULTILINE) for name in _IMAGENET]
    classes, templates = (ast.literal_eval(value[1]) for value in values if value)
    return _named(classes), tuple(templates)


_IMAGENET = ("imagenet_classes", "imagenet_templates")


def read_clip_benchmark(checkout: Path) -> tuple[dict[str, Lists], dict[str, tuple[str, ...]]]:
    """Its class names and templates by its own names of datasets."""
    folder = checkout / "clip_benchmark" / "datasets"
    names = json.loads((folder / "en_classnames.json").read_text("utf-8"))
    templates = json.loads((folder / "en_zeroshot_classification_templates.json").read_text("utf-8"))
    return (
        {name: _named(classes) for name, classes in names.items()},
        {name: tuple(t.replace("{c}", "{}") for t in several) for name, several in templates.items()},
    )


def _named(classes: list[str | list[str]]) -> Lists:
    return tuple((entry,) if isinstance(entry, str) else tuple(entry) for entry in classes)


def compare(openai: Path, clip_benchmark: Path) -> Iterator[str]:
    """What the sources have and the registry has not."""
    entries = [load_dataset_entry(name) for name in known_datasets()]
    paper = [(used.names, used.templates) for used in (entry.resolve("paper") for entry in entries)]
    for title, lists in {**read_prompts(openai), "ImageNet": read_notebook(openai)}.items():
        if lists not in paper:
            yield f"openai/CLIP, {title}: no dataset has its classes and templates"
    theirs = [entry.resolve("clip_benchmark") for entry in entries if _has_profile(entry)]
    by_name, templates = read_clip_benchmark(clip_benchmark)
    for title, classes in by_name.items():
        if classes not in [used.names for used in theirs] + [names for names, _ in paper]:
            yield f"CLIP_benchmark, {title}: no dataset has its class names"
    for title, several in templates.items():
        if title != "dummy" and several not in [used.templates for used in theirs]:
            yield f"CLIP_benchmark, {title}: no dataset has its templates"
    for line in (clip_benchmark / "benchmark" / "webdatasets.txt").read_text().split():
        repo = "clip-benchmark/wds_" + line.removeprefix("wds/").replace("/", "-")
        if repo not in [entry.wds for entry in entries]:
            yield f"CLIP_benchmark, {line}: no dataset lies in {repo}"


def _has_profile(entry: Dataset) -> bool:
    return "clip_benchmark" in entry.profiles


if __name__ == "__main__":
    differences = list(compare(Path(sys.argv[1]), Path(sys.argv[2])))
    print("\n".join(differences) or f"{len(known_datasets())} datasets, no difference")
    sys.exit(bool(differences))
