"""Sets whose classes are ImageNet's: pooled classes, and what a probe of ImageNet says of them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from exams import COLOURS, SHAPES, write_wds

from diptych.checkpoint import layouts
from diptych.decode import decode
from diptych.embed.images import ImageTower, embed_images
from diptych.embed.texts import embed_texts
from diptych.errors import UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.registry import load_dataset_entry
from diptych.evaluate.metrics.measures import accuracy
from diptych.evaluate.metrics.robustness import map_classes
from diptych.evaluate.models.features import cut_border
from diptych.evaluate.results import Result, save_result
from diptych.evaluate.run import run
from diptych.zeroshot import build_classifier
from samples import TINY_VIT, draw, encode, make_loaded


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    layouts.save(make_loaded(TINY_VIT), path, "diptych")
    return path


def drawn():
    return [encode(draw(colour, shape)) for colour in COLOURS for shape in SHAPES][:30]


def evaluate(model, tmp_path, name, *protocols):
    config = EvaluateConfig(
        models=(str(model),),
        suite=(name,),
        data=tmp_path,
        out=tmp_path / "out",
        on_mismatch="warn",
        protocols=protocols,
    )
    return run(config)


def test_the_best_of_a_group_counts_and_an_empty_group_never_wins():
    scores = torch.tensor([[0.1, 0.9, 0.3, -2], [5, 1, 2, 7]])
    pooled = map_classes(scores, ((0, 1), (), (2, 3)))
    assert pooled[:, 0].tolist() == pytest.approx([0.9, 5])
    assert pooled[:, 2].tolist() == pytest.approx([0.3, 7])
    assert (pooled[:, 1] < scores.amin(dim=1)).all()


def objectnet(folder):
    """A copy whose classes stand in another order than the registry's."""
    names = [str(name) for name in load_dataset_entry("objectnet").classes][::-1]
    samples = [(f"p{i}", str(i % 113).encode(), data) for i, data in enumerate(drawn())]
    write_wds(folder / "objectnet", samples, classnames=names, templates=None)
    return torch.tensor([112 - i % 113 for i in range(30)])


def save_probe(tmp_path, weight, bias):
    details = {"l2": 1.0, "validation": [], "train_images": 5, "converged": True}
    save_of_imagenet(tmp_path, "probe", details, weight=weight.numpy(), bias=bias.numpy())


def save_of_imagenet(tmp_path, protocol, details, **arrays):
    folder = tmp_path / "out" / "tiny" / "imagenet"
    folder.mkdir(parents=True, exist_ok=True)
    names = [names[0] for names in load_dataset_entry("imagenet").names]
    np.savez(folder / f"{protocol}.npz", names=np.array(names), **arrays)
    earlier = Result(
        model="tiny", dataset="imagenet", protocol=protocol, metric="acc1", value=0.5, images=3, details=details
    )
    save_result(tmp_path / "out", earlier)


def test_zero_shot_has_the_accuracy_of_pooled_classes_too(model, tmp_path):
    labels = objectnet(tmp_path)
    (result,) = evaluate(model, tmp_path, "objectnet").results
    imagenet, entry, loaded = load_dataset_entry("imagenet"), load_dataset_entry("objectnet"), make_loaded(TINY_VIT)
    images = embed_images(loaded, [cut_border(decode(data), 2) for data in drawn()])
    weights = build_classifier(partial(embed_texts, loaded), imagenet.names, imagenet.resolve("paper").templates)
    pooled = map_classes(images @ weights, entry.imagenet_groups)
    assert result.metrics["acc1_pooled"] == accuracy(pooled, labels)


def pooled_features():
    loaded = make_loaded(TINY_VIT)
    pixels = [loaded.preprocess.pixels(cut_border(decode(data), 2)) for data in drawn()]
    return ImageTower(loaded, "exact", pooled=True).encode(torch.from_numpy(np.stack(pixels)))


def test_a_probe_of_imagenet_is_asked_about_a_shift(model, tmp_path):
    labels = objectnet(tmp_path)
    report = evaluate(model, tmp_path, "objectnet", "probe")
    assert "first evaluate imagenet with --protocols probe" in report.refused[0].reason
    entry = load_dataset_entry("objectnet")
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1000, 32, generator=generator), torch.randn(1000, generator=generator)
    save_probe(tmp_path, weight, bias)
    (result,) = evaluate(model, tmp_path, "objectnet", "probe").results
    expected = accuracy(map_classes(pooled_features() @ weight.T + bias, entry.imagenet_groups), labels)
    assert result.value == expected
    assert (result.details["trained_on"], result.details["train_images"]) == ("imagenet", 5)


def test_probes_of_few_shots_of_imagenet_are_asked_about_a_shift(model, tmp_path):
    labels = objectnet(tmp_path)
    report = evaluate(model, tmp_path, "objectnet", "fewshot")
    assert "first evaluate imagenet with --protocols fewshot" in report.refused[0].reason
    generator = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(2, 1000, 32, generator=generator) for k in (1, 8)}
    biases = {k: torch.randn(2, 1000, generator=generator) for k in (1, 8)}
    arrays = {f"weight_{k}": weights[k].numpy() for k in weights} | {f"bias_{k}": biases[k].numpy() for k in biases}
    details = {"l2": 1.0, "train_images": {"1": 1000, "8": 8000}}
    save_of_imagenet(tmp_path, "fewshot", details, shots=np.array([1, 8]), **arrays)
    (result,) = evaluate(model, tmp_path, "objectnet", "fewshot").results
    groups = load_dataset_entry("objectnet").imagenet_groups
    expected = {
        str(k): [
            accuracy(map_classes(pooled_features() @ weights[k][i].T + biases[k][i], groups), labels) for i in (0, 1)
        ]
        for k in (1, 8)
    }
    assert result.details["shots"] == expected
    assert len({tuple(values) for values in expected.values()}) == 2
    assert (result.value, result.details["trained_on"]) == (result.metrics["8_shot"], "imagenet")
    assert (evaluate(model, tmp_path, "objectnet", "fewshot").resumed) == 1
    arrays["weight_1"] += 1  # another probe is another result
    save_of_imagenet(tmp_path, "fewshot", details, shots=np.array([1, 8]), **arrays)
    with pytest.raises(UsageError, match=r"other settings: ImageNet's probe;"):
        evaluate(model, tmp_path, "objectnet", "fewshot")


@pytest.mark.slow
def test_few_shots_of_imagenet_leave_their_probes(model, tmp_path):
    names = [str(name) for name in load_dataset_entry("imagenet").names]
    pictures = drawn()
    for split, each in (("train", 2), ("test", 1)):
        samples = [(f"{split}{i}", str(i % 1000).encode(), pictures[i % len(pictures)]) for i in range(1000 * each)]
        write_wds(tmp_path / "imagenet", samples, classnames=names, templates=None, split=split)
    config = EvaluateConfig(
        models=(str(model),),
        suite=("imagenet",),
        data=tmp_path,
        out=tmp_path / "out",
        on_mismatch="warn",
        protocols=("fewshot",),
        shots=(1, 2),
        seeds=2,
    )
    (trained,) = run(config).results
    objectnet(tmp_path)
    (asked,) = evaluate(model, tmp_path, "objectnet", "fewshot").results
    assert set(asked.details["shots"]) == set(trained.details["shots"]) == {"1", "2"}
    assert asked.details["train_images"] == {"1": 1000, "2": 2000}
    with np.load(tmp_path / "out" / "tiny" / "imagenet" / "fewshot.npz") as kept:
        assert kept["weight_2"].shape == (2, 1000, 32)


def test_frames_are_asked_by_the_probe_of_imagenet(model, tmp_path):
    folder = tmp_path / "ytbb_robust"
    folder.mkdir()
    for i, data in enumerate(drawn()):
        (folder / f"{i}.jpg").write_bytes(data)
    names = [str(name) for name in load_dataset_entry("ytbb_robust").classes]
    frames = {"classes": names, "labels": {"0.jpg": [1], "4.jpg": [19]}, "sets": {"0.jpg": ["1.jpg"], "4.jpg": []}}
    (folder / "frames.json").write_text(json.dumps(frames))
    bias = torch.zeros(1000)
    bias[10] = 5.0  # a bird, as class 1 is
    save_probe(tmp_path, torch.zeros(1000, 32), bias)
    temporal, probe = evaluate(model, tmp_path, "ytbb_robust", "temporal", "probe").results
    assert (probe.metrics["pm0"], probe.metrics["pm10"]) == (0.5, 0.5)
    assert probe.details["anchors"] == 2
    assert 0 <= temporal.metrics["acc1_pooled"] <= 1
    weights, biases = np.zeros((1, 1000, 32), np.float32), bias.numpy()[None]
    details = {"l2": 1.0, "train_images": {"4": 4000}}
    save_of_imagenet(tmp_path, "fewshot", details, shots=np.array([4]), weight_4=weights, bias_4=biases)
    (few,) = evaluate(model, tmp_path, "ytbb_robust", "fewshot").results
    assert (few.metrics["4_shot"], few.metric) == (0.5, "pm0")


def test_frames_whose_source_names_imagenet_s_classes_are_pooled(model, tmp_path):
    """ImageNet-Vid-Robust's own files say which of ImageNet's classes belong to which of its 30."""
    folder, names = (
        tmp_path / "imagenet_vid_robust",
        [str(n) for n in load_dataset_entry("imagenet_vid_robust").classes],
    )
    for i, data in enumerate(drawn()):
        (folder / "val").mkdir(parents=True, exist_ok=True)
        (folder / "val" / f"{i}.jpg").write_bytes(data)
    shuffled = [*names[1:], names[0]]
    files = {
        "metadata/labels.json": {"val/0.jpg": [0], "val/4.jpg": [1]},
        "metadata/pmsets.json": {"val/0.jpg": ["val/1.jpg"], "val/4.jpg": []},
        "misc/imagenet_vid_class_index.json": {str(i): [f"v{i}", name] for i, name in enumerate(shuffled)},
        "misc/imagenet_class_index.json": {str(i): [f"n{i}", "x"] for i in range(1000)},
        "misc/rev_wnid_map.json": {f"v{i}": [f"n{2 * i + 1}", f"n{2 * i}"] for i in range(30)},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    bias = torch.zeros(1000)
    bias[3] = 5.0  # of the source's class 1
    save_probe(tmp_path, torch.zeros(1000, 32), bias)
    temporal, probe = evaluate(model, tmp_path, "imagenet_vid_robust", "temporal", "probe").results
    assert (probe.metrics["pm0"], probe.metrics["pm10"]) == (0.5, 0.5)
    assert 0 <= temporal.metrics["acc1_pooled"] <= 1
    (folder / "misc/rev_wnid_map.json").write_text("{}")
    report = evaluate(model, tmp_path, "imagenet_vid_robust", "temporal")
    assert "no class 'v0' in rev_wnid_map.json" in report.refused[0].reason
