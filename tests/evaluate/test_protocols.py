"""Protocols end to end on small sets: prompts, frames, overlap, probes, and what is refused."""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import combinations

import jobs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from exams import NAMES, pictures, write_own, write_shapes, write_wds

from diptych.checkpoint import layouts
from diptych.embed.images import embed_images
from diptych.embed.texts import embed_texts
from diptych.errors import UsageError
from diptych.evaluate.cell import PROTOCOL_SPECS
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.metrics.measures import accuracy
from diptych.evaluate.protocols.prompts import embed_templates, join_templates, search_templates
from diptych.evaluate.results import PROTOCOLS
from diptych.evaluate.run import run
from diptych.zeroshot import ZeroShotClassifier, build_classifier
from samples import TINY_VIT, make_loaded

TEMPLATES = ("a drawing of a {}.", "{} on white", "the {}", "a bad picture of {}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    layouts.save(make_loaded(TINY_VIT), path, "diptych")
    return path


def evaluate(model, tmp_path, suite, **options):
    options.setdefault("data", tmp_path)
    config = EvaluateConfig(models=(str(model),), suite=(str(suite),), out=tmp_path / "results", **options)
    return run(config)


# --- prompts ---


def test_joined_templates_are_the_classifier_of_the_zero_shot_room():
    embed, names = partial(embed_texts, make_loaded(TINY_VIT)), [["circle", "disc"], "square", ["cross"]]
    table = embed_templates(embed, names, TEMPLATES)
    torch.testing.assert_close(join_templates(table), build_classifier(embed, names, TEMPLATES), atol=1e-6, rtol=0)


def greedy(features, labels, table, metric):
    """The search as one would write it down."""
    chosen, best = [], -1.0
    while len(chosen) < len(table):
        values = {
            t: metric(features @ join_templates(table[[*chosen, t]]), labels)
            for t in range(len(table))
            if t not in chosen
        }
        t = max(values, key=lambda t: (values[t], -t))
        if values[t] <= best:
            break
        chosen, best = [*chosen, t], values[t]
    return chosen, best


@pytest.mark.parametrize("keep", [1 << 28, 0])
def test_the_search_is_the_plain_greedy_one(monkeypatch, keep):
    monkeypatch.setattr("diptych.evaluate.protocols.prompts.KEPT", keep)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        table = torch.nn.functional.normalize(torch.randn(12, 6, 16, generator=generator), dim=-1)
        labels = torch.arange(120) % 6
        features = table.mean(dim=0)[labels] + 0.2 * torch.randn(120, 16, generator=generator)
        features = torch.nn.functional.normalize(features, dim=-1)
        steps = search_templates(features, labels, table, accuracy)
        chosen, best = greedy(features, labels, table, accuracy)
        assert [t for t, _ in steps] == chosen
        assert steps[-1][1] == best
        assert best >= max(accuracy(features @ join_templates(table[[t]]), labels) for t in range(12))
        values = [value for _, value in steps]
        assert values == sorted(values)


def test_prompts_are_searched_on_training_pictures(model, tmp_path):
    templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    write_shapes(tmp_path / "shapes", templates=templates)
    suite = write_own(tmp_path / "mine.toml")
    (alone,) = evaluate(model, tmp_path, suite, protocols=("prompts",)).results
    assert "there is no train split" in " ".join(alone.warnings)
    write_shapes(tmp_path / "shapes", templates=templates, split="train", each=8)
    (result,) = evaluate(model, tmp_path, suite, protocols=("prompts",), redo=True).results
    assert "there is no train split" not in " ".join(result.warnings)
    loaded = make_loaded(TINY_VIT)
    embed = partial(embed_texts, loaded)
    images, labels = embed_images(loaded, [data for *_, data in pictures()]), torch.arange(24) % 4
    for name, some in (("bare", ["{}"]), ("simple", ["a photo of a {}."]), ("ensemble", TEMPLATES)):
        expected = accuracy(images @ build_classifier(embed, NAMES, some), labels)
        assert result.details[name] == result.metrics[name] == expected
    found = [template for template, _ in result.details["search"]]
    assert found
    assert set(found) <= set(TEMPLATES)
    assert result.value == accuracy(images @ build_classifier(embed, NAMES, found), labels)
    assert result.details["search_pictures"] == 32


# --- frames, overlap ---


def test_frames_are_right_with_their_neighbours(model, tmp_path):
    (tmp_path / "video").mkdir()
    for key, _, data in pictures():
        (tmp_path / "video" / f"{key}.jpg").write_bytes(data)
    labels = {f"{key}.jpg": [number] for key, number, _ in pictures()}
    anchors = [f"red-{name}.jpg" for name in NAMES]
    sets = {anchor: [anchor.replace("red", colour) for colour in ("green", "blue")] for anchor in anchors}
    (tmp_path / "video" / "frames.json").write_text(
        json.dumps({"classes": NAMES, "labels": {anchor: labels[anchor] for anchor in anchors}, "sets": sets})
    )
    suite = write_own(tmp_path / "mine.toml", "kind = 'frames'", "path = 'video'")
    (result,) = evaluate(model, tmp_path, suite).results
    kept = np.load(tmp_path / "results" / "tiny" / "mine" / "temporal.npz")
    right = dict(zip(kept["keys"].tolist(), kept["scores"].argmax(axis=1) == kept["labels"], strict=True))
    assert len(right) == 12
    assert result.metrics["pm0"] == np.mean([right[anchor] for anchor in anchors])
    assert result.metrics["pm10"] == np.mean([all(right[f] for f in (a, *sets[a])) for a in anchors])
    assert (result.protocol, result.metric, result.details["anchors"]) == ("temporal", "pm0", 4)


def test_the_overlap_divides_the_answers(model, tmp_path):
    write_shapes(tmp_path / "shapes")
    suite = write_own(tmp_path / "mine.toml")
    keys = [key for key, *_ in pictures()][:5]
    pq.write_table(pa.table({"key": keys, "score": [1.0] * 5}), tmp_path / "overlap.parquet")
    options = {"protocols": ("zeroshot", "overlap"), "overlap": tmp_path / "overlap.parquet"}
    zeroshot, overlap = evaluate(model, tmp_path, suite, **options).results
    assert overlap.details["overlapping"] == 5
    assert overlap.value == zeroshot.value
    kept = np.load(tmp_path / "results" / "tiny" / "mine" / "zeroshot.npz")
    right = kept["scores"].argmax(axis=1) == kept["labels"]
    assert overlap.metrics["acc_overlap"] == pytest.approx(right[:5].mean())
    assert overlap.metrics["acc_clean"] == pytest.approx(right[5:].mean())
    pq.write_table(pa.table({"key": ["stranger"]}), tmp_path / "other.parquet")
    report = evaluate(model, tmp_path, suite, **options | {"overlap": tmp_path / "other.parquet"}, redo=True)
    assert "1 keys of the overlap are not in mine (stranger" in report.refused[0].reason
    with pytest.raises(UsageError, match="belong together"):
        evaluate(model, tmp_path, suite, protocols=("overlap",))
    with pytest.raises(UsageError, match="of one dataset"):
        evaluate(model, tmp_path, "kornblith12", **options)


# --- probes ---


def test_probes_train_on_features_before_the_projection(model, tmp_path):
    pytest.importorskip("diptych.evaluate.probe.search")
    pytest.importorskip("diptych.evaluate.probe.fewshot")
    write_shapes(tmp_path / "shapes")
    write_shapes(tmp_path / "shapes", split="train", each=8)
    suite = write_own(tmp_path / "mine.toml")
    options = {"protocols": ("fewshot", "probe", "zeroshot"), "shots": (1, 2, 16), "seeds": 3}
    report = evaluate(model, tmp_path, suite, **options)
    assert not report.refused
    zeroshot, probe, fewshot = report.results
    assert probe.details["train_images"] == 32
    assert probe.value > zeroshot.value
    assert set(fewshot.details["shots"]) == {"1", "2"}
    assert [len(values) for values in fewshot.details["shots"].values()] == [3, 3]
    assert "16 shots were left out: 4 classes" in fewshot.warnings[-1]
    assert evaluate(model, tmp_path, suite, **options).resumed == 3


def test_folds_are_trained_on_one_after_the_other(model, tmp_path):
    write_shapes(tmp_path / "shapes")
    write_shapes(tmp_path / "shapes", split="train", each=8)
    suite, folds = write_own(tmp_path / "mine.toml"), [range(16), range(16, 32), range(32)]
    (tmp_path / "shapes" / "fold_indices.txt").write_text("".join(" ".join(map(str, fold)) + "\n" for fold in folds))
    (result,) = evaluate(model, tmp_path, suite, protocols=("probe",)).results
    assert len(result.details["folds"]) == 3
    assert result.value == pytest.approx(sum(result.details["folds"]) / 3)
    assert result.details["train_images"] == round((16 + 16 + 32) / 3)
    with np.load(tmp_path / "results" / result.model / "mine" / "probe.npz") as kept:
        for number, value in enumerate(result.details["folds"]):
            assert (kept[f"scores_{number}"].argmax(axis=1) == kept["labels"]).mean() == pytest.approx(value)
    (tmp_path / "shapes" / "fold_indices.txt").unlink()  # the last fold was all pictures
    (whole,) = evaluate(model, tmp_path, suite, protocols=("probe",), redo=True).results
    assert whole.value == result.details["folds"][2]


def test_a_fold_of_broken_pictures_is_refused(model, tmp_path):
    write_shapes(tmp_path / "shapes")
    drawn = [(key, str(number).encode(), data) for key, number, data in pictures(each=8)]
    write_wds(tmp_path / "shapes", [*drawn[:-1], (drawn[-1][0], drawn[-1][1], b"no picture")], split="train")
    (tmp_path / "shapes" / "fold_indices.txt").write_text(f"{' '.join(map(str, range(31)))}\n31\n")
    report = evaluate(model, tmp_path, write_own(tmp_path / "mine.toml"), protocols=("probe",))
    assert "no training features" in report.refused[0].reason


@pytest.mark.parametrize(
    ("text", "said"), [("0 1 x", "is no number"), ("0 32", "places up to 32"), ("", "places up to 0")]
)
def test_folds_that_do_not_fit_are_refused(model, tmp_path, text, said):
    write_shapes(tmp_path / "shapes")
    write_shapes(tmp_path / "shapes", split="train", each=8)
    (tmp_path / "shapes" / "fold_indices.txt").write_text(text)
    report = evaluate(model, tmp_path, write_own(tmp_path / "mine.toml"), protocols=("probe",))
    assert said in report.refused[0].reason


def test_a_probe_without_training_pictures_is_refused_and_the_rest_done(model, tmp_path):
    pytest.importorskip("diptych.evaluate.probe.search")
    write_shapes(tmp_path / "shapes")
    report = evaluate(model, tmp_path, write_own(tmp_path / "mine.toml"), protocols=("zeroshot", "probe"))
    assert [result.protocol for result in report.results] == ["zeroshot"]
    assert [(one.protocol, one.reason) for one in report.refused] == [("probe", "mine has no train split here")]


def test_a_train_split_that_is_damaged_refuses_only_what_needs_it(model, tmp_path):
    write_shapes(tmp_path / "shapes")
    write_shapes(tmp_path / "shapes", split="train")
    (tmp_path / "shapes" / "train" / "1.tar").unlink()
    report = evaluate(model, tmp_path, write_own(tmp_path / "mine.toml"), protocols=("zeroshot", "prompts"))
    assert [result.protocol for result in report.results] == ["zeroshot"]
    (refused,) = report.refused
    assert (refused.protocol, refused.reason[:6]) == ("prompts", "train:")
    assert "lacks 1 of 2 shards: 1.tar" in refused.reason


# --- what is doubtful or refused ---


def test_labels_in_a_wrong_order_are_found(model, tmp_path):
    """The set is labelled with what the model says, so it is always right; then with the labels of other classes."""
    classifier = ZeroShotClassifier(make_loaded(TINY_VIT), NAMES, ("a drawing of a {}.",))
    drawn = pictures(each=8)
    said = classifier.decision_function([data for *_, data in drawn]).argmax(axis=1)
    for name, shift in (("right", 0), ("wrong", 1)):
        labelled = [(key, str((n + shift) % 4).encode(), data) for (key, _, data), n in zip(drawn, said, strict=True)]
        write_wds(tmp_path / name, labelled)
        write_own(tmp_path / f"{name}.toml", data=f"path = '{name}'")
    (tmp_path / "suite.toml").write_text("datasets = ['right.toml', 'wrong.toml']")
    right, wrong = evaluate(model, tmp_path, tmp_path / "suite.toml").results
    assert (right.value, wrong.value) == (1.0, 0.0)
    assert not any("permuted" in warning for warning in right.warnings)
    assert any(
        "labels look permuted" in warning and "is 100.0% instead of 0.0%" in warning for warning in wrong.warnings
    )


def test_a_class_without_pictures_is_named(model, tmp_path):
    samples = [(key, str(number).encode(), data) for key, number, data in pictures() if number != 2]
    write_wds(tmp_path / "shapes", samples)
    suite = write_own(tmp_path / "mine.toml")
    (result,) = evaluate(model, tmp_path, suite).results
    assert any("1 of 4 classes have no picture in test: triangle" in warning for warning in result.warnings)
    exact = write_own(tmp_path / "exact.toml", f"classes = {list(NAMES)}\nprofiles.paper.splits.test = 18")
    (refused,) = evaluate(model, tmp_path, exact).refused
    assert "classes have no picture in test: triangle; --on-mismatch warn" in refused.reason


def test_a_missing_or_truncated_shard_refuses_the_set_and_others_go_on(model, tmp_path):
    for name in ("a", "b", "c"):
        write_shapes(tmp_path / name)
        write_own(tmp_path / f"{name}.toml", data=f"path = '{name}'")
    (tmp_path / "a" / "test" / "0.tar").unlink()
    tar = tmp_path / "b" / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:6000])
    (tmp_path / "suite.toml").write_text("datasets = ['a.toml', 'b.toml', 'c.toml']")
    report = evaluate(model, tmp_path, tmp_path / "suite.toml")
    assert [result.dataset for result in report.results] == ["c"]
    assert "lacks 1 of 2 shards: 0.tar" in report.refused[0].reason
    assert "1.tar is damaged" in report.refused[1].reason


def test_a_model_that_gives_nan_is_refused_by_name(tmp_path):
    loaded = make_loaded(TINY_VIT)
    with torch.no_grad():
        loaded.model.visual.ln_post.weight[0] = float("nan")
    layouts.save(loaded, tmp_path / "broken", "diptych")
    write_shapes(tmp_path / "shapes")
    (refused,) = evaluate(tmp_path / "broken", tmp_path, write_own(tmp_path / "mine.toml")).refused
    assert "gives NaN or infinity for 24 of 24 pictures" in refused.reason
    loaded = make_loaded(TINY_VIT)
    with torch.no_grad():
        loaded.model.text.ln_final.weight[0] = float("nan")
    layouts.save(loaded, tmp_path / "mute", "diptych")
    (refused,) = evaluate(tmp_path / "mute", tmp_path, tmp_path / "mine.toml").refused
    assert "24 of 24 pictures have scores that are NaN" in refused.reason


def test_two_ranks_write_what_one_writes(model, tmp_path):
    write_shapes(tmp_path / "shapes")
    suite = write_own(tmp_path / "mine.toml")
    (alone,) = evaluate(model, tmp_path, suite).results
    command = [sys.executable, "-m", "diptych", "evaluate", "--model", str(model), "--suite", str(suite), "--json"]
    command += ["--out", str(tmp_path / "both")]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port())}
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE)
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[1] == b""
    (both,) = json.loads(outputs[0])["results"]
    assert both["value"] == alone.value
    assert both["metrics"] == dict(alone.metrics)


def test_every_pair_of_protocols_keeps_its_order():
    """Later ones look at the results of earlier ones."""
    order = list(PROTOCOL_SPECS)
    assert {*order, "bias"} == {*PROTOCOLS}, "a protocol has a name and a row in the table"
    for first, second in combinations(("zeroshot", "probe", "fewshot"), 2):
        assert order.index(first) < order.index(second)
