"""The demo from end to end, on a part of its icons."""

import json
import re

import pytest

pytest.importorskip("resvg_py", reason="the extra `demo` is not installed")
pytest.importorskip("material", reason="the extra `demo` is not installed")

from recipes import demo, icons

from diptych.shards.dataset import load_dataset


@pytest.fixture(scope="module")
def some_icons(tmp_path_factory):
    """Every fourth icon, which is enough for words to meet between the families."""
    with pytest.MonkeyPatch.context() as patch:
        training, family = list(icons.iter_training_icons())[::4], list(icons.iter_font_awesome())[::4]
        patch.setattr(icons, "iter_training_icons", lambda: iter(training))
        patch.setattr(icons, "iter_font_awesome", lambda: iter(family))
        folder = tmp_path_factory.mktemp("icons") / "pairs"
        demo.build_pairs(folder)
    return folder


def test_nothing_that_is_held_out_is_trained_on(some_icons):
    manifest = json.loads((some_icons / "manifest.json").read_text())
    training = list(load_dataset(some_icons / "training").pairs)
    words = {word for pair in training for word in pair.caption.split()}
    assert len(training) == manifest["training"]
    assert not words & set(manifest["held_out_words"])
    assert not [pair for pair in training if pair.details["family"].startswith("fontawesome")]
    concepts = list(load_dataset(some_icons / "concepts").pairs)
    assert {pair.details["label"] for pair in concepts} <= set(manifest["held_out_words"])
    assert all(pair.details["label"] in pair.caption.split() for pair in concepts)


def test_every_class_of_the_family_has_a_name_from_a_training_caption(some_icons):
    captions = list(load_dataset(some_icons / "training").captions)
    words = {word for caption in captions for word in caption.split()}
    classes = icons.class_names(load_dataset(some_icons / "family").pairs, captions)
    assert len(classes) >= 50
    names = [name for names in classes.values() for name in names]
    assert set(names) <= words
    assert len(names) == len(set(names))


def test_a_drawing_that_does_not_parse_is_not_rendered():
    assert icons.render(icons.Icon("f", "k", "c", "<svg", "MIT")) is None


def test_the_demo_answers_writes_its_results_and_a_self_contained_report(some_icons, tmp_path, capsys):
    given = demo.Demo(out=tmp_path / "run", pairs=some_icons, steps=60, batch_size=64)
    results = demo.main(given)
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    for name in ("held_out_family", "held_out_concepts", "digits"):
        assert results[name].keys() == {"acc1", "acc5", "chance", "ci95", "classes", "images"}
        assert 0 <= results[name]["ci95"][0] <= results[name]["acc1"] <= results[name]["ci95"][1] <= 1
    assert results["digits"]["images"] == 1797
    assert {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)} < results[
        "retrieval"
    ].keys()
    html = (tmp_path / "run/report.html").read_text("utf-8")
    assert "held-out" in html.lower()
    assert not re.search(r'(src|href)="(?!data:)', html), "the report asks for a file of its own"
    assert "chance" in capsys.readouterr().out


def test_the_demo_does_not_train_twice(some_icons, tmp_path, capsys):
    given = demo.Demo(out=tmp_path / "run", pairs=some_icons, steps=55, batch_size=32)
    first = demo.main(given)
    capsys.readouterr()
    assert demo.main(given) == first
    assert "nothing was left to train" in capsys.readouterr().out
