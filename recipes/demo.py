"""`make demo`: from real pairs to a zero-shot answer, in one command.

Builds 15,000 pairs of icons and their names, trains a small CLIP on them for a few minutes, and asks it to name what
it has not seen: the icons of another family, words that were in no caption, and handwritten digits. Writes
`results.json` and a self-contained `report.html` into the run's folder. Run again, it continues or answers at once.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from diptych import files
from diptych.checkpoint import layouts
from diptych.cli import exit_on_error
from diptych.cli.training import print_train_report, train_with_progress
from diptych.config import to_dict
from diptych.embed.images import embed_images
from diptych.embed.texts import embed_texts
from diptych.evaluate.metrics.measures import classification, retrieval
from diptych.image import Picture
from diptych.model.config import CLIPConfig, get_preset
from diptych.pair import Pair
from diptych.report.page import Example, pick_rows
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.templates import load_templates
from diptych.tokenizer import train_bpe
from diptych.train.config import RunConfig, TrainConfig
from diptych.train.page import write_run_page
from diptych.train.recipe import SMALL_DATA
from diptych.zeroshot import Classnames, build_classifier
from recipes.icons import build_icon_shards, class_names, load_digits
from recipes.report import draw_overview, tell_results

PRESET = "RN-Ti"
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 24
TESTS = ("held_out_family", "held_out_concepts", "digits")
DIGIT_NAMES = tuple(f"number {digit}" for digit in range(10))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo can be told."""

    out: Path = Path("runs/demo")
    """The run's folder."""
    pairs: Path = Path("runs/demo-pairs")
    """Folder of the rendered pairs; they are built when they are missing."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = SMALL_DATA.loader.batch_size
    """Pairs a step."""
    lr: float = SMALL_DATA.optim.lr
    """Peak learning rate."""
    seed: int = 0
    """Of weights, order and crops."""


@dataclass(frozen=True)
class ZeroShotTest:
    """A zero-shot test: pictures, the classes to choose from, and what is right."""

    name: str
    title: str
    pictures: Sequence[Picture]
    classnames: Classnames
    labels: torch.Tensor


def main(demo: Demo) -> dict[str, Any]:
    """Run the demo from end to end."""
    started = time.monotonic()
    build_pairs(demo.pairs)
    print(f"pairs: {len(load_dataset(demo.pairs / 'training')):,} for training, in {time.monotonic() - started:.0f} s")
    config = train_config(demo)
    report = train_with_progress(config)
    print_train_report(report)
    results, examples = evaluate(demo)
    if (demo.out / "results.json").exists() and report.resumed_from == report.steps:
        results["seconds"] = json.loads((demo.out / "results.json").read_text())["seconds"]  # nothing was trained now
    else:
        results["seconds"] = round(time.monotonic() - started, 1)
    files.write_json(demo.out / "results.json", results)
    print_results(results)
    titles: dict[str, str] = dict(zip(TESTS, examples, strict=True))
    page = write_run_page(config, report, examples, tell_results(results, titles))
    print(f"report: {page}")
    return results


def build_pairs(folder: Path) -> None:
    """Render the icons, once."""
    if (folder / "manifest.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    report = build_icon_shards(folder)
    files.write_json(folder / "manifest.json", dataclasses.asdict(report))
    dropped = ", ".join(f"{reason} {count}" for reason, count in report.dropped.items() if count)
    print(f"built {report.training:,} training pairs; dropped: {dropped or 'none'}")


def train_config(demo: Demo) -> TrainConfig:
    """The run: a small modified ResNet and a small text tower with a vocabulary of their own."""
    tokenizer = demo.pairs / "tokenizer"
    if not tokenizer.exists():
        train_bpe(load_dataset(demo.pairs / "training").captions, VOCAB_SIZE, CONTEXT_LENGTH).save(tokenizer)
    preset = get_preset(PRESET)
    text = dataclasses.replace(preset.text, vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
    model: CLIPConfig = dataclasses.replace(preset, text=text, templates=load_templates("none"))
    return TrainConfig(
        model=model,
        data=(SourceConfig(path=demo.pairs / "training"),),
        out=demo.out,
        tokenizer=tokenizer,
        loader=LoaderConfig(batch_size=demo.batch_size, seed=demo.seed),
        optim=dataclasses.replace(SMALL_DATA.optim, lr=demo.lr),
        run=RunConfig(steps=demo.steps, checkpoint_every=100),
    )


def evaluate(demo: Demo) -> tuple[dict[str, Any], dict[str, list[Example]]]:
    """Ask the trained model what it never saw, and draw overview.png; numbers, and right and wrong answers."""
    loaded = layouts.load(demo.out)
    manifest = json.loads((demo.pairs / "manifest.json").read_text())
    training = load_dataset(demo.pairs / "training")
    family = list(load_dataset(demo.pairs / "family").pairs)
    concepts = list(load_dataset(demo.pairs / "concepts").pairs)
    questions = (
        ask_family(family, list(training.captions)),
        ask_concepts(concepts),
        ZeroShotTest("digits", "Handwritten digits", *_digits()),
    )
    results: dict[str, Any] = {"pairs": manifest["training"], "seconds": None}
    examples: dict[str, list[Example]] = {}
    for question in questions:
        features = embed_images(loaded, question.pictures)
        scores = features @ build_classifier(partial(embed_texts, loaded), question.classnames, ["{}"])
        results[question.name] = classification(scores, question.labels)
        examples[question.title] = pick_examples(
            question, (scores * loaded.model.logit_scale.exp().detach()).softmax(-1)
        )
    solid = [pair for pair in family if pair.details["family"] == "fontawesome-solid"]
    image_features = embed_images(loaded, [pair.image or b"" for pair in solid])
    text_features = embed_texts(loaded, [pair.caption for pair in solid])
    results["retrieval"] = {**retrieval(image_features, text_features), "pairs": len(solid)}
    results["dropped"] = manifest["dropped"]
    results["demo"] = to_dict(demo)
    batch = list(training.pairs)[:: max(1, len(training) // 24)][:24]
    matrix = embed_images(loaded, [p.image or b"" for p in batch]) @ embed_texts(loaded, [p.caption for p in batch]).T
    title, some = next(iter(examples.items()))
    overview = draw_overview(matrix.numpy(), batch, title, results["held_out_family"], some)
    files.write_bytes(demo.out / "overview.png", overview)
    return results, examples


def ask_family(family: Sequence[Pair], captions: Sequence[str]) -> ZeroShotTest:
    """Solid icons of the held-out family; every class has a name that occurs in a training caption."""
    classes = class_names(family, captions)
    pictures = [pair.image or b"" for pair in family if pair.key in classes]
    labels = torch.arange(len(classes))
    return ZeroShotTest("held_out_family", "Held-out family: Font Awesome", pictures, list(classes.values()), labels)


def ask_concepts(concepts: Sequence[Pair]) -> ZeroShotTest:
    """Pictures of the families that were trained on, named by words that were in no caption."""
    words = sorted({pair.details["label"] for pair in concepts})
    labels = torch.tensor([words.index(pair.details["label"]) for pair in concepts])
    return ZeroShotTest(
        "held_out_concepts", "Held-out concepts", [pair.image or b"" for pair in concepts], words, labels
    )


def pick_examples(question: ZeroShotTest, probabilities: torch.Tensor) -> list[Example]:
    """Right and wrong answers, evenly spread over the pictures, with the five likeliest labels."""
    names = [name if isinstance(name, str) else name[0] for name in question.classnames]
    top = probabilities.topk(min(5, len(names)))
    return [
        Example(
            picture=question.pictures[row],
            label=names[int(question.labels[row])],
            answers=[(names[i], p) for i, p in zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)],
        )
        for row in pick_rows((top.indices[:, 0] == question.labels).numpy())
    ]


def print_results(results: dict[str, Any]) -> None:
    """The numbers, with what guessing would reach."""
    for name in TESTS:
        r = results[name]
        low, high = r["ci95"]
        verdict = "" if low > r["chance"] else "   (not distinguishable from chance)"
        print(
            f"{name:18} acc1 {r['acc1']:6.2%}  acc5 {r['acc5']:6.2%}  chance {r['chance']:6.2%} = "
            f"{r['acc1'] / r['chance']:4.1f}x  95% [{low:.2%}, {high:.2%}]  "
            f"{r['classes']} classes, {r['images']} pictures{verdict}"
        )
    recalls = ", ".join(f"{k} {v:.2%}" for k, v in results["retrieval"].items() if k != "pairs")
    print(f"retrieval among {results['retrieval']['pairs']} held-out pairs: {recalls}")


def _digits() -> tuple[Sequence[Picture], Classnames, torch.Tensor]:
    pictures, labels = load_digits()
    return pictures, DIGIT_NAMES, torch.tensor(labels)


if __name__ == "__main__":
    with exit_on_error():
        main(tyro.cli(Demo, description=__doc__))
