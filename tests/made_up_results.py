"""A results folder with numbers that were made up, of every protocol, as `diptych evaluate` would leave it."""

import random
from pathlib import Path

import numpy as np

from diptych.evaluate.metrics.measures import wilson_interval
from diptych.evaluate.metrics.overlap import measure_overlap
from diptych.evaluate.references import PAPER27, SHIFTS, reference
from diptych.evaluate.results import ModelFacts, Result, save_model, save_result

MODELS = {"b32": ("ViT-B-32/openai", 8.3), "l336": ("ViT-L-14-336/openai", 370.0), "mine": ("runs/mine", 1.2)}
BASELINES = {"resnet50": 8.2, "bit": 80.0}
METRICS = {"voc2007": "map_11_point", "kinetics700": "mean_top1_top5", "hateful_memes": "roc_auc"}
PER_CLASS = ("fgvc_aircraft", "oxford_pets", "caltech101", "flowers102")
ABOUT = {"torch": "2.13.0", "date": "2026-11-25", "settings": {"seed": 0}}


def write(folder: Path, *, datasets=PAPER27) -> Path:
    """Write the whole folder: five models; the paper's two are near their published numbers."""
    chance = random.Random(0)
    for name, (source, gflops) in MODELS.items():
        save_model(folder, facts(name, source, gflops))
    for name, gflops in BASELINES.items():
        save_model(folder, facts(name, f"timm:{name}", gflops, baseline=True))
    for dataset in datasets:
        for model in MODELS:
            value = save_zero_shot(folder, chance, model, dataset)
            save_prompts(folder, chance, model, dataset, value)
            save_few_shot(folder, chance, model, dataset, value)
        for model in (*MODELS, *BASELINES):
            value = published(model, dataset, "probe") or chance.uniform(0.5, 0.9)
            save(folder, model, dataset, "probe", value, details={"l2": 0.3, "train_images": 4000, "converged": True})
    for model in MODELS:
        save_shifts(folder, chance, model)
        save_retrieval(folder, chance, model)
    save_overlaps(folder, chance)
    save_bias(folder)
    return folder


def facts(name, source, gflops, *, baseline=False):
    return ModelFacts(
        name=name,
        source=source,
        space=f"space-{name}",
        embed_dim=512,
        image_size=224,
        parameters=150_000_000,
        gflops=gflops,
        baseline=baseline,
    )


def published(model, dataset, protocol):
    source = MODELS.get(model, ("",))[0]
    found = reference(dataset, source, protocol, profile="paper")
    return found[0].value if found else None


def metric_of(dataset):
    return METRICS.get(dataset, "mean_per_class_recall" if dataset in PER_CLASS else "acc1")


def save(folder, model, dataset, protocol, value, **fields):
    metric = fields.pop("metric", metric_of(dataset))
    fields.setdefault("metrics", {metric: value})
    fields.setdefault("ci95", wilson_interval(value, 1000))
    result = Result(
        model=model, dataset=dataset, protocol=protocol, metric=metric, value=value, images=1000, about=ABOUT, **fields
    )
    save_result(folder, result)


def save_zero_shot(folder, chance, model, dataset):
    value = published(model, dataset, "zeroshot") or chance.uniform(0.2, 0.6)
    value = min(0.99, max(0.01, value + chance.uniform(-0.02, 0.02)))
    per_class = [{"name": f"class <{i}>", "images": 50, "recall": (i % 11) / 10} for i in range(20)]
    warnings = ["at chance: 10.0 % of <b>10 %</b>"] if dataset == "kitti_distance" else []
    details = {"ece": 0.04, "temperature": 1.3, "nll": 0.9, "templates": ["a photo of a {}."], "names": [["x"]]}
    save(
        *(folder, model, dataset, "zeroshot", value),
        chance=0.01,
        per_class=per_class,
        warnings=warnings,
        details=details,
        skipped={"truncated": 2},
    )
    return value


def save_prompts(folder, chance, model, dataset, value):
    details = {"bare": value * 0.93, "simple": value * 0.95, "ensemble": value, "search": [["a {}.", value]]}
    save(folder, model, dataset, "prompts", value * 1.005, details=details)


def save_few_shot(folder, chance, model, dataset, value):
    shots = (1, 2, 4, 8) if dataset == "birdsnap" else (1, 2, 4, 8, 16)
    values = {
        str(k): [value * (0.8 + 0.05 * i + chance.uniform(0, 0.02)) for _ in range(3)] for i, k in enumerate(shots)
    }
    efficiency = None if dataset == "mnist" else chance.uniform(1, 60)
    details = {"shots": values, "train_images": 4000, "efficiency": efficiency}
    save(folder, model, dataset, "fewshot", values[str(shots[-1])][0], details=details)


def save_shifts(folder, chance, model):
    for shift in SHIFTS:
        frames = shift in ("imagenet_vid_robust", "ytbb_robust")
        protocol, metric = ("temporal", "pm0") if frames else ("zeroshot", "acc1")
        value = published(model, shift, protocol) or chance.uniform(0.3, 0.8)
        metrics = {metric: value, **({"pm10": value - 0.1} if frames else {"acc1_pooled": value - 0.02})}
        save(folder, model, shift, protocol, value, metric=metric, metrics=metrics)
        details = {"trained_on": "imagenet", "l2": 1.0, "train_images": 9000}
        save(folder, model, shift, "probe", value - 0.03, metric=metric, details=details)
        few = {str(k): [value - 0.2 + 0.01 * k] * 3 for k in (1, 4, 16)}
        details = {"trained_on": "imagenet", "shots": few, "train_images": 9000}
        save(folder, model, shift, "fewshot", few["16"][0], metric=metric, details=details)


def save_retrieval(folder, chance, model):
    for dataset in ("flickr30k", "mscoco"):
        ways = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)]
        metrics = {way: chance.uniform(0.5, 0.9) for way in ways}
        metrics["mean_recall@1"] = (metrics[ways[0]] + metrics[ways[3]]) / 2
        save(folder, model, dataset, "retrieval", metrics["mean_recall@1"], metric="mean_recall@1", metrics=metrics)


def save_overlaps(folder, chance):
    for dataset, seen, better in (
        ("birdsnap", 120, 0.2),
        ("country211", 215, 0.0),
        ("food101", 5, 0.1),
        ("mnist", 0, 0),
    ):
        answers = {str(i): chance.random() < 0.5 + better * (i < seen) for i in range(1000)}
        found = measure_overlap(answers, [str(i) for i in range(seen)])
        details = {**vars(found), "interval": list(found.interval)}
        save(folder, "l336", dataset, "overlap", found.acc_all, metric="acc1", details=details)


def save_bias(folder):
    rate = {"hits": 5, "pictures": 50, "share": 0.1, "interval": list(wilson_interval(0.1, 50))}
    groups = {"non_human": {"race": {"White": rate, "Black": rate}}, "crime": {"gender": {"Male": rate}}}
    save(folder, "l336", "fairface", "bias", 0.7, metric="acc1_race", details={"groups": groups})


def save_scores(folder, model, *, classes=20, images=400):
    """Scores on ImageNet in which the first half of the classes is easy and the other is not."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, images)
    scores = generator.normal(size=(images, classes)).astype(np.float32)
    easy = labels < classes // 2
    scores[np.arange(images)[easy], labels[easy]] += 9
    np.savez(folder / model / "imagenet" / "zeroshot.npz", scores=scores, labels=labels, keys=np.arange(images))
