"""`diptych classify` of many pictures, of tars, with scores, and of labels that cannot be meant."""

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych import ZeroShotClassifier
from diptych.checkpoint import layouts
from diptych.checkpoint.formats import native
from diptych.errors import CheckpointError
from diptych.templates import SIMPLE
from samples import TINY_VIT, draw, encode, make_loaded, write_samples, write_tar
from test_cli import call

LABELS = ["--labels", "red dot", "blue ring", "green bar"]
LONG = "a name that is longer than any terminal is wide, as photographs of cameras and downloads often have them.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    native.save(folder / "plain", make_loaded(TINY_VIT))
    loaded = make_loaded(replace(TINY_VIT, logit_bias=True))
    with torch.no_grad():
        loaded.model.logit_bias.fill_(-3)
    native.save(folder / "siglip", loaded)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in ((LONG, "red"), ("b, c.png", "blue"), ("d.png", "green")):
        draw(colour, "dot").save(folder / name)
    return folder


def test_several_pictures_are_a_line_each_and_counted_beside_it(model, pictures, capsys):
    assert call("classify", pictures, *LABELS, "--model", model / "plain") == 0
    printed = capsys.readouterr()
    rows = [line.split("\t") for line in printed.out.splitlines()]
    assert [row[0] for row in rows] == [str(pictures / name) for name in sorted((LONG, "b, c.png", "d.png"))]
    assert all(len(row) == 3 and row[1] in LABELS and row[2].endswith("%") for row in rows)
    assert printed.err.startswith("in all: ")
    assert call("classify", pictures, *LABELS, "--model", model / "plain", "--top", 2) == 0
    assert [len(line.split("\t")) for line in capsys.readouterr().out.splitlines()] == [5, 5, 5]


@pytest.mark.parametrize(("flag", "delimiter"), [("--csv", ","), ("--tsv", "\t")])
def test_a_table_has_every_answer_in_a_row(model, pictures, capsys, flag, delimiter):
    assert call("classify", pictures, *LABELS, "--model", model / "plain", flag, "--top", 3) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out), delimiter=delimiter))
    assert len(rows) == 9
    assert rows[0].keys() == {"image", "label", "probability"}
    of_one = [float(row["probability"]) for row in rows if row["image"].endswith("b, c.png")]
    assert sum(of_one) == pytest.approx(1, abs=1e-4)
    assert call("classify", pictures, *LABELS, "--model", model / "plain", flag, "--json") == 2


@pytest.mark.parametrize("kind", ["plain", "siglip"])
def test_scores_do_not_depend_on_the_other_labels(model, pictures, capsys, kind):
    found = []
    for labels in (LABELS, LABELS[:3]):
        arguments = ["classify", pictures / "d.png", *labels, "--model", model / kind]
        assert call(*arguments, "--scores", "--json") == 0
        answers = json.loads(capsys.readouterr().out)["labels"]
        found.append(next(answer for answer in answers if answer["label"] == "red dot"))
    assert found[0]["probability"] != pytest.approx(found[1]["probability"])
    assert found[0]["cosine"] == pytest.approx(found[1]["cosine"], abs=1e-6)
    assert ("sigmoid" in found[0]) == (kind == "siglip")
    assert call(*arguments, "--scores") == 0
    bars = capsys.readouterr().out
    assert f"cosine {found[0]['cosine']:+.3f}" in bars
    assert ("sigmoid" in bars) == (kind == "siglip")
    assert call(*arguments, "--scores", "--csv") == 0
    assert capsys.readouterr().out.startswith("image,label,probability,cosine,sigmoid\n")


def test_python_gives_the_same_scores(model, pictures):
    loaded = layouts.load(model / "siglip")
    classifier = ZeroShotClassifier(loaded, LABELS[1:])
    paths = sorted(pictures.iterdir())
    scores = classifier.predict_scores(paths)
    scale, bias = loaded.model.logit_scale.exp().item(), -3
    np.testing.assert_allclose(scores.probability, classifier.predict_proba(paths))
    np.testing.assert_allclose(scores.cosine * scale, classifier.decision_function(paths), rtol=1e-5)
    assert scores.sigmoid is not None
    np.testing.assert_allclose(scores.sigmoid, 1 / (1 + np.exp(-(scale * scores.cosine + bias))), rtol=1e-4)
    assert classifier.predict_scores([]).cosine.shape == (0, 3)


def test_members_of_tars_are_classified_as_embed_reads_them(model, tmp_path, capsys):
    write_samples(tmp_path / "shards", 6, samples_per_shard=4)
    good = encode(draw("red", "dot"))
    members = [("x/a.jpg", good), ("b.jpg", good[:100]), ("b.txt", b"no picture"), ("c.cr2", b"?"), ("x/a.jpg", good)]
    tar = write_tar(tmp_path / "own.tar", members)
    assert call("classify", tar, tmp_path / "shards", *LABELS, "--model", model / "plain", "--json") == 1
    printed = capsys.readouterr()
    names = [json.loads(line)["image"] for line in printed.out.splitlines()]
    first = f"{tmp_path / 'shards' / '00000.tar'}:red-circle"
    assert names[:2] == [f"{tar}:x/a", first]
    assert len(names) == 7
    assert f"{tar}:x/a: skipped, duplicate_key" in printed.err
    assert f"{tar}:b: skipped, truncated" in printed.err
    assert "not taken for pictures: .cr2 1" in printed.err
    assert "skipped: 2 of 9 pictures" in printed.err


def test_a_sheet_shows_the_pictures_of_each_label(model, pictures, tmp_path, capsys):
    out = tmp_path / "sheet.html"
    labels = ["--labels", "<b>red", "blue"]
    assert call("classify", pictures, *labels, "--model", model / "plain", "--html", out) == 0
    html = out.read_text("utf-8")
    assert html.count("data:image/jpeg") == 3
    assert "<b>" not in html
    assert f"written: {out}" in capsys.readouterr().err


def test_labels_that_have_swallowed_the_pictures_are_told(pictures, capsys):
    assert call("classify", "--labels", "a", "b", *sorted(pictures.iterdir())) == 2
    error = capsys.readouterr().err
    assert "no picture was named, and 3 labels of 5 are pictures (" in error
    assert "name pictures before it" in error


def test_a_checkpoint_names_the_templates_that_suit_it(model, pictures, tmp_path, capsys):
    loaded = make_loaded(replace(TINY_VIT, templates=("{}",)))
    native.save(tmp_path / "bare", loaded)
    again = layouts.load(tmp_path / "bare")
    assert ZeroShotClassifier(again, LABELS[1:]).templates == ("{}",)
    assert ZeroShotClassifier(layouts.load(model / "plain"), LABELS[1:]).templates == SIMPLE
    answers = []
    for name, more in (("bare", []), ("bare", ["--templates", "none"]), ("bare", ["--templates", "simple"])):
        assert call("classify", pictures / "d.png", *LABELS, "--model", tmp_path / name, "--json", *more) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    layouts.save(again, tmp_path / "other", "diptych")  # and keeps them through a conversion
    assert layouts.load(tmp_path / "other").model.config.templates == ("{}",)


def test_evaluate_asks_with_the_templates_of_the_checkpoint(tmp_path, capsys):
    for name in ("red dot", "blue dot"):
        (tmp_path / "set" / name).mkdir(parents=True)
        draw(name.split()[0], "dot").save(tmp_path / "set" / name / "a.png")
    (tmp_path / "mine.toml").write_text("[data]\npath = 'set'\n")
    for name, templates in (("bare", ("{}",)), ("plain", ())):
        native.save(tmp_path / name, make_loaded(replace(TINY_VIT, templates=templates)))
        call("evaluate", "--model", tmp_path / name, "--suite", tmp_path / "mine.toml", "--out", tmp_path / "results")
        (path,) = (tmp_path / "results").glob(f"**/{name}/**/*zeroshot*.json")
        assert json.loads(path.read_text())["details"]["templates"] == list(templates or SIMPLE)


def test_a_checkpoint_without_templates_is_written_as_before(model, tmp_path):
    assert "templates" not in json.loads((model / "plain" / "checkpoint.json").read_text())["model"]


def test_templates_of_a_checkpoint_that_are_none_are_refused(tmp_path):
    config = replace(TINY_VIT)
    object.__setattr__(config, "templates", ("no place",))
    native.save(tmp_path / "m", make_loaded(config))
    with pytest.raises(CheckpointError, match="needs exactly one"):
        layouts.load(tmp_path / "m")


def test_a_sheet_shows_a_name_that_is_not_utf_8(model, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / os.fsdecode(b"a\xff.png")).write_bytes(encode(draw("red", "dot"), "PNG"))
    sheet = tmp_path / "new" / "sheet.html"
    assert call("classify", folder, "--labels", "a\udcfe", "b", "--model", model / "plain", "--html", sheet) == 0
    assert "a\\udcff.png" in sheet.read_text()
    capsys.readouterr()
    assert call("classify", folder, "--labels", "a", "b", "--model", model / "plain", "--html", folder) == 2
    assert capsys.readouterr().out == ""  # before any picture is looked at


@pytest.mark.parametrize("given", [b"cat\n\xff\n", None])
def test_labels_from_a_standard_input_that_has_none(pictures, model, given):
    """None: it is closed."""
    command = [sys.executable, "-m", "diptych", "classify", pictures, "--model", model / "plain", "--labels", "@-"]
    command = ["bash", "-c", f'"$@" {"" if given else "<&-"}', "-", *map(str, command)]
    ended = subprocess.run(command, input=given, capture_output=True, timeout=60, env=os.environ | {"LC_ALL": "C"})
    assert ended.returncode == 2
    assert (b"is not UTF-8" if given else b"no label was named") in ended.stderr
