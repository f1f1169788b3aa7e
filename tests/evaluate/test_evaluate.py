import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from exams import NAMES, npy, pictures, write_captions, write_own, write_shapes, write_wds

from diptych.checkpoint import layouts
from diptych.cli import main
from diptych.embed.images import embed_images
from diptych.embed.texts import embed_texts
from diptych.errors import NotFoundError, UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.labels import ClassIndex, align_classes
from diptych.evaluate.metrics.measures import accuracy, retrieval
from diptych.evaluate.models.baselines import baseline
from diptych.evaluate.results import iter_results, load_models
from diptych.evaluate.run import run
from diptych.zeroshot import ZeroShotClassifier
from samples import COLOURS, SHAPES, TINY_RESNET, TINY_VIT, draw, encode, make_loaded


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    layouts.save(make_loaded(TINY_VIT), path, "diptych")
    return path


def evaluate(model, tmp_path, suite, **options):
    config = EvaluateConfig(
        models=(str(model),), suite=(str(suite),), out=tmp_path / "results", data=tmp_path / "data", **options
    )
    return run(config)


@pytest.mark.parametrize("twins", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301")])
def test_classes_that_are_one_to_the_model_are_named(model, tmp_path, twins):
    for name in (*twins, "dog"):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        draw("red", "dot").save(tmp_path / "set" / "test" / name / "a.png")
    (result,) = evaluate(model, tmp_path, tmp_path / "set").results
    assert any(one.startswith("several classes are called ca") for one in result.warnings)


def test_zero_shot_is_what_the_classifier_says(model, tmp_path):
    write_shapes(tmp_path / "shapes")
    report = evaluate(model, tmp_path, write_own(tmp_path / "mine.toml", "title = 'Shapes'"))
    (result,) = report.results
    classifier = ZeroShotClassifier(make_loaded(TINY_VIT), NAMES, ("a drawing of a {}.",))
    drawn = pictures()
    scores = torch.from_numpy(classifier.decision_function([data for *_, data in drawn]))
    labels = torch.tensor([number for _, number, _ in drawn])
    assert (result.dataset, result.protocol, result.profile, result.images) == ("mine", "zeroshot", "own", 24)
    assert result.value == result.metrics["acc1"] == accuracy(scores, labels)
    assert result.chance == 0.25
    assert [entry["name"] for entry in result.per_class] == list(NAMES)
    assert np.trace(result.details["confusion"]) == round(result.value * 24)
    kept = np.load(tmp_path / "results" / "tiny" / "mine" / "zeroshot.npz")
    np.testing.assert_allclose(kept["scores"], scores.numpy(), atol=2e-4)
    assert kept["labels"].tolist() == labels.tolist()
    assert kept["keys"].tolist() == [key for key, *_ in drawn]
    facts = load_models(tmp_path / "results")["tiny"]
    assert (facts.embed_dim, facts.image_size) == (24, 32)
    assert result.about["settings"]["images"] != facts.space  # features before the projection lie in another space


def write_folders(folder, *splits):
    for split in splits:
        for key, number, data in pictures():
            (folder / split / NAMES[number]).mkdir(parents=True, exist_ok=True)
            (folder / split / NAMES[number] / f"{key}.jpg").write_bytes(data)


def test_a_folder_or_a_table_is_evaluated_without_a_toml(model, tmp_path):
    write_folders(tmp_path / "labelled", "Train", "validation")
    report = evaluate(model, tmp_path, tmp_path / "labelled", protocols=("zeroshot", "probe"))
    zero, probed = report.results
    assert (zero.dataset, zero.profile, zero.images, zero.about["layout"]) == ("labelled", "own", 24, "folders")
    assert not any("are in train too" in warning for warning in zero.warnings)
    assert any("24 of 24 pictures of test are in train too" in warning for warning in probed.warnings)
    lines = [f"labelled/validation/{NAMES[n]}/{key}.jpg,{NAMES[n]}" for key, n, _ in pictures()]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *lines]))
    assert evaluate(model, tmp_path, tmp_path / "table.csv").results[0].value == zero.value
    write_captions(tmp_path / "described")
    (result,) = evaluate(model, tmp_path, tmp_path / "described").results
    assert (result.dataset, result.protocol) == ("described", "retrieval")


def test_a_suite_that_is_none_leads_to_the_page_on_ones_own(model, tmp_path):
    for name in (tmp_path / "nowhere", "labeled"):
        with pytest.raises((UsageError, NotFoundError), match=r"a folder, a table or a TOML \(docs/evaluate\.md\)"):
            evaluate(model, tmp_path, name)


def test_it_goes_on_where_it_was_and_refuses_other_settings(model, tmp_path):
    write_shapes(tmp_path / "shapes")
    suite = write_own(tmp_path / "mine.toml")
    first = evaluate(model, tmp_path, suite)
    path = tmp_path / "results" / "tiny" / "mine" / "zeroshot.json"
    before = path.read_bytes()
    again = evaluate(model, tmp_path, suite)
    assert (first.resumed, again.resumed) == (0, 1)
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match=r"zeroshot\.json was made with other settings: seed; .*--redo"):
        evaluate(model, tmp_path, suite, seed=1)
    assert evaluate(model, tmp_path, suite, seed=1, redo=True).resumed == 0
    write_shapes(tmp_path / "shapes", each=5)
    with pytest.raises(UsageError, match="other settings: files or labels of the dataset, seed;"):
        evaluate(model, tmp_path, suite)


def test_pictures_that_changed_under_their_names_are_noticed(model, tmp_path, capsys):
    for key, number, data in pictures():
        path = tmp_path / "shapes" / "test" / NAMES[number] / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    suite = write_own(tmp_path / "mine.toml")
    before = evaluate(model, tmp_path, suite).results[0]
    for key, number, data in pictures():
        (
            tmp_path
            / "shapes"
            / "test"
            / NAMES[(number + 1) % 4]
            / f"{key.rpartition('-')[0]}-{NAMES[(number + 1) % 4]}.jpg"
        ).write_bytes(data)
    with pytest.raises(UsageError, match="other settings: files or labels of the dataset;"):
        evaluate(model, tmp_path, suite)
    again = evaluate(model, tmp_path, suite, redo=True)
    assert (again.resumed, again.results[0].images) == (0, before.images)
    assert again.results[0].per_class != before.per_class or again.results[0].value != before.value


def test_what_no_dataset_is_for_and_what_was_left_out_is_said(model, tmp_path, capsys):
    write_shapes(tmp_path / "shapes")
    drawn = [(key, str(number).encode(), data) for key, number, data in pictures()]
    write_wds(tmp_path / "shapes", [*drawn[:-1], (drawn[-1][0], drawn[-1][1], b"no picture")])
    suite = write_own(tmp_path / "mine.toml")
    command = ["evaluate", "--model", str(model), "--suite", str(suite), "--out", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--protocols", "zeroshot", "retrieval"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"skipped: {model.name}, mine: pictures that cannot be used (" in printed
    assert "not measured: retrieval: it is for datasets of kind captions, and there is none among these" in printed
    with pytest.raises(SystemExit) as ended:
        main([*command, "--protocols", "retrieval"])
    assert ended.value.code == 1


def test_a_path_or_a_made_set_that_is_not_there_is_named(model, tmp_path):
    suite = write_own(tmp_path / "mine.toml")
    with pytest.raises(NotFoundError, match=r"the dataset is not there:\n  mine: .*/shapes, which is not there"):
        evaluate(model, tmp_path, suite)
    with pytest.raises(NotFoundError, match=r"digits: python -m recipes\.datasets DATA, which makes it") as caught:
        evaluate(model, tmp_path, "made")
    assert "--download" not in str(caught.value)


def test_options_that_cannot_be_are_refused_before_anything_is_opened(model, tmp_path):
    with pytest.raises(UsageError, match=r"use python -m recipes\.faces"):
        evaluate(model, tmp_path, "cifar10", protocols=("bias",))
    with pytest.raises(UsageError, match="no shots were named"):
        evaluate(model, tmp_path, "cifar10", shots=())
    write_shapes(tmp_path / "shapes")
    (tmp_path / "odd.toml").write_text("title='x'\n[profiles.own]\ntemplates=['a drawing']\n[data]\npath='shapes'\n")
    with pytest.raises(UsageError, match=r"unknown template list 'a drawing'; .* has one {}"):
        evaluate(model, tmp_path, tmp_path / "odd.toml")
    (tmp_path / "odd.parquet").write_text("no table")
    options = {"protocols": ("overlap",), "overlap": tmp_path / "odd.parquet"}
    with pytest.raises(UsageError, match=r"odd\.parquet is no overlap\.parquet with a column of keys"):
        evaluate(model, tmp_path, write_own(tmp_path / "mine.toml"), **options)


def test_several_datasets_and_models_into_one_folder(model, tmp_path):
    other = tmp_path / "other"
    layouts.save(make_loaded(TINY_RESNET), other, "diptych")
    write_shapes(tmp_path / "shapes")
    mine = write_own(tmp_path / "mine.toml")
    write_captions(tmp_path / "data" / "flickr8k")
    config = EvaluateConfig(
        models=(str(model), f"resnet={other}"),
        suite=(str(mine), "flickr8k", "mnist"),
        out=tmp_path / "results",
        data=tmp_path / "data",
        on_mismatch="warn",
    )
    report = run(config)
    found = {(result.model, result.dataset, result.protocol) for result in report.results}
    assert found == {
        (m, d, p) for m in ("tiny", "resnet") for d, p in (("mine", "zeroshot"), ("flickr8k", "retrieval"))
    }
    assert set(report.missing) == {"mnist"}
    assert "clip-benchmark/wds_mnist" in report.missing["mnist"]
    assert list(iter_results(tmp_path / "results")) == sorted(report.results, key=lambda r: (r.model, r.dataset))


def test_retrieval_is_that_of_the_metric_with_the_papers_prefix(model, tmp_path):
    write_captions(tmp_path / "data" / "flickr8k")
    (result,) = evaluate(model, tmp_path, "flickr8k", on_mismatch="warn").results
    loaded = make_loaded(TINY_VIT)
    assert result.details["captions"] == 33
    assert result.details["prefix"] == "a photo of "
    assert "16 pictures, the profile paper says 1,000" in result.warnings[0]
    texts, of_text, images = [], [], []
    for i in range(16):
        colour, shape = COLOURS[i % 8], SHAPES[i // 8]
        lines = [f"a {colour} {shape}", f"{shape} in {colour}"] + ["the first"] * (i == 0)
        texts += [f"a photo of {line}" for line in lines]
        of_text += [i] * len(lines)
        images.append(encode(draw(colour, shape)))
    expected = retrieval(embed_images(loaded, images), embed_texts(loaded, texts), image_of_text=torch.tensor(of_text))
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)


def test_several_labels_are_ranked_by_their_softmax(model, tmp_path):
    samples = [(key, npy([int(c == number or c == 3) for c in range(4)]), data) for key, number, data in pictures()]
    write_wds(tmp_path / "shapes", samples, "npy")
    suite = write_own(tmp_path / "multi.toml", "kind = 'multi'")
    (result,) = evaluate(model, tmp_path, suite).results
    assert result.metric == "map_11_point"
    assert 0 < result.value <= 1
    assert (6 / 24 * 3 + 1) / 4 < result.chance < 0.7  # the share of positives, and what the best of a few gives
    kept = np.load(tmp_path / "results" / "tiny" / "multi" / "zeroshot.npz")
    assert kept["labels"].shape == (24, 4)


def test_nothing_there_says_where_to_get_it(model, tmp_path):
    with pytest.raises(NotFoundError, match=r"none of the 12 datasets.*\n(.*\n)*.*cifar10: https://huggingface"):
        evaluate(model, tmp_path, "kornblith12")


def test_the_command_prints_a_table_and_a_refused_set_is_code_1(model, tmp_path, capsys):
    write_shapes(tmp_path / "data" / "mnist")
    arguments = ["evaluate", "--model", str(model), "--suite", "mnist", "--data", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--out", str(tmp_path / "results")])
    assert end.value.code == 1
    assert (
        "failed: tiny, mnist, zeroshot: test: mnist: the source has 4 classes, the registry 10"
        in capsys.readouterr().out
    )
    write_shapes(tmp_path / "shapes")
    mine = write_own(tmp_path / "mine.toml")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--model", str(model), "--suite", str(mine), "--out", str(tmp_path / "results"), "--json"])
    assert end.value.code == 0
    data = json.loads(capsys.readouterr().out)
    assert data["results"][0]["dataset"] == "mine"


def test_a_kill_loses_one_dataset_at_most(model, tmp_path):
    """Killed for good in the middle of the second dataset; started again it takes up the first and ends whole."""
    for name in ("a", "b", "c"):
        write_shapes(tmp_path / name, each=8)
        write_own(tmp_path / f"{name}.toml", data=f"path = '{name}'")
    command = [sys.executable, "-m", "diptych", "evaluate", "--model", str(model), "--out", str(tmp_path / "results")]
    command += ["--suite", *(str(tmp_path / f"{name}.toml") for name in "abc"), "--json"]
    done = tmp_path / "results" / "tiny" / "a" / "zeroshot.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 60
    while not done.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done.exists()
    before = done.read_bytes()
    again = subprocess.run(command, capture_output=True, check=True)
    report = json.loads(again.stdout)
    assert report["resumed"] >= 1
    assert done.read_bytes() == before
    assert [result["dataset"] for result in report["results"]] == ["a", "b", "c"]
    assert not list((tmp_path / "results").rglob("*.tmp"))


def see(images: torch.Tensor) -> torch.Tensor:
    """Average colours of nine fields."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


def colours():
    return baseline("colours", see, image_size=32, gflops=0.001)


def test_a_baseline_is_probed_and_refused_where_texts_are_needed(tmp_path):
    source = f"python:{__name__}:colours"
    for split in ("train", "test"):
        write_shapes(tmp_path / "shapes", split=split)
    suite = write_own(tmp_path / "mine.toml")
    report = evaluate(source, tmp_path, suite, protocols=("zeroshot", "probe"))
    (result,) = report.results
    assert (result.protocol, result.images) == ("probe", 24)
    assert result.value > 0.5  # shapes fill fields differently
    (refused,) = report.refused
    assert refused.protocol == "zeroshot"
    assert "reads no texts" in refused.reason
    facts = load_models(tmp_path / "results")[result.model]
    assert (facts.baseline, facts.embed_dim, facts.gflops) == (True, 27, 0.001)


# --- classes are names, never places in a list ---


def write_class_folders(folder, split, names):
    for name in names:
        (folder / split / name).mkdir(parents=True)
        for i, colour in enumerate(COLOURS[:4]):
            (folder / split / name / f"{i}.png").write_bytes(encode(draw(colour, SHAPES[i % 4]), "PNG"))


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ("abcdefgh", "abcdefhi", "only in train: g; only in test: i"),
        ("abcd", "bcde", "only in train: a; only in test: e"),
        ("abc", "ab", "only in train: c"),
        ("ab", "abc", "only in test: c"),
    ],
)
def test_splits_with_other_classes_are_refused_by_name(model, tmp_path, train, test, said):
    write_class_folders(tmp_path / "own", "train", train)
    write_class_folders(tmp_path / "own", "test", test)
    suite = write_own(tmp_path / "own.toml", data="path = 'own'")
    report = evaluate(model, tmp_path, suite, protocols=("zeroshot", "probe", "fewshot"))
    assert {result.protocol for result in report.results} == {"zeroshot"}
    assert {refused.protocol for refused in report.refused} == {"probe", "fewshot"}
    assert all(said in refused.reason for refused in report.refused)


def test_splits_that_list_their_classes_in_another_order_agree():
    test = ClassIndex(numbers=((0,), (1,), (2,)), names=(("a",), ("b",), ("c",)), templates=())
    train = ClassIndex(numbers=((0,), (1,), (2,), (0, 1)), names=(("c",), ("a",), ("b",)), templates=())
    aligned = align_classes(train, test, "train")
    assert aligned.names == test.names
    assert aligned.numbers == ((2,), (0,), (1,), (2, 0))
