"""Datasets that are made here: whole, balanced, the same bytes again, and without a word of the test in training."""

import hashlib
import io
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from recipes.made import drawings
from recipes.made.datasets import make_counting, make_datasets, make_digits, make_rendered_text
from recipes.made.drawings import BAD, GOOD, Draws, place_objects, write_sentence

from diptych.errors import UsageError
from diptych.evaluate.training_evaluators import open_set


def read(folder):
    """(picture, label, text) of all samples of a split."""
    found = []
    for number in range(int((folder / "nshards.txt").read_text())):
        with tarfile.open(folder / f"{number}.tar") as tar:
            samples = {}
            for member in tar:
                stem, _, ending = member.name.partition(".")
                samples.setdefault(stem, {})[ending] = tar.extractfile(member).read()
        for sample in samples.values():
            picture = Image.open(io.BytesIO(sample["png"]))
            found.append((picture, int(sample["cls"]), sample.get("txt", b"").decode()))
    return found


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "rendered_text"
    make_rendered_text(folder, train=60, test=30)
    return folder


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "counting"
    make_counting(folder, train=32, test=17)
    return folder


def test_digits_are_all_there_and_look_like_scikit_learn_s(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    make_digits(tmp_path / "digits")
    train, test = read(tmp_path / "digits" / "train"), read(tmp_path / "digits" / "test")
    assert (len(train), len(test)) == (1000, 797)
    bunch = datasets.load_digits()
    assert [label for _, label, _ in train + test] == bunch.target.tolist()
    for row in (0, 999, 1796):
        picture = (train + test)[row][0]
        assert (picture.size, picture.mode) == ((64, 64), "RGB")
        small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), bunch.images[row].ravel())[0, 1] > 0.98
    assert (tmp_path / "digits" / "classnames.txt").read_text().split() == list("0123456789")


def test_the_evaluators_of_training_take_the_layout(text, counting):
    assert open_set(text).classnames == ("negative", "positive")
    exam = open_set(counting)
    assert (len(exam.samples), exam.classnames) == (17, tuple(str(n) for n in range(3, 11)))
    assert not exam.samples.skipped


@pytest.mark.parametrize("make", [make_rendered_text, make_counting])
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path, make):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / name, train=9, test=8, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a" / "test") != digest(tmp_path / "c" / "test")


def test_classes_are_balanced_and_mixed(text, counting):
    labels = [label for _, label, _ in read(text / "train")]
    assert Counter(labels) == {0: 30, 1: 30}
    assert labels != sorted(labels)
    counts = Counter(label for _, label, _ in read(counting / "test"))
    assert set(counts) == set(range(8))
    assert set(counts.values()) == {2, 3}


def test_no_sentence_is_in_both_splits_or_twice(text):
    sentences = [sentence for split in ("train", "test") for *_, sentence in read(text / split)]
    assert len(set(sentences)) == len(sentences) == 90


def test_words_alone_do_not_tell_the_opinion():
    """Words of praise occur in negative sentences and the other way round, denied or conceded."""
    for opinion in (0, 1):
        sentences = [write_sentence(Draws(0, "test", number), opinion) for number in range(200)]
        for words in (GOOD, BAD):
            with_one = sum(any(f" {word}" in sentence for word in words) for sentence in sentences)
            assert with_one > 40, (opinion, words[0])


def test_sentences_fit_their_pictures(text):
    for picture, *_ in read(text / "test"):
        pixels = np.asarray(picture.convert("L"))
        assert pixels.shape == (448, 448)
        assert pixels.min() < 60, "something is written"
        assert pixels[:, -12:].min() == 255, "nothing is cut off at the right"
        assert pixels[-12:].min() == 255, "nor below"


@pytest.mark.parametrize("count", range(3, 11))
def test_as_many_objects_are_placed_and_none_is_hidden(count):
    for number in range(6):
        things = place_objects(Draws(0, "test", number), count)
        assert len(things) == count
        assert [thing.y for thing in things] == sorted(thing.y for thing in things), "near ones are drawn last"
        assert all(thing.x - thing.radius > 0 and thing.x + thing.radius < drawings.SCENE_SIZE for thing in things)
        for i, thing in enumerate(things):
            assert _seen(thing, things[i + 1 :]) > 0.5


def _seen(thing, in_front):
    """The share of a disc that no disc in front of it covers."""
    side = np.linspace(-1, 1, 60) * thing.radius
    x, y = (axis + at for axis, at in zip(np.meshgrid(side, side), (thing.x, thing.y), strict=True))
    own = (x - thing.x) ** 2 + (y - thing.y) ** 2 <= thing.radius**2
    covered = np.zeros_like(own)
    for other in in_front:
        covered |= (x - other.x) ** 2 + (y - other.y) ** 2 <= other.radius**2
    return (own & ~covered).sum() / own.sum()


def test_a_scene_shows_each_of_its_objects():
    """Without one of them the picture is another one, where that one stands."""
    things = place_objects(Draws(0, "test", 1), 7)
    whole = np.asarray(drawings.draw_scene(things), dtype=float)
    assert whole.shape == (224, 224, 3)
    for thing in things:
        without = np.asarray(drawings.draw_scene([one for one in things if one is not thing]), dtype=float)
        changed = np.abs(whole - without).max(axis=2) > 8
        rows, columns = np.nonzero(changed)
        assert changed.sum() > 0.8 * thing.radius**2
        assert abs(np.median(columns) - thing.x) < 1.2 * thing.radius
        assert abs(np.median(rows) - thing.y) < 1.5 * thing.radius


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match="was not made here"):
        make_counting(tmp_path / "mine", train=8, test=8)
    assert (tmp_path / "mine" / "letters.txt").read_text() == "dear"


def test_too_few_pictures_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(UsageError, match="each needs one of 8 classes"):
        make_counting(tmp_path / "a", train=7, test=8)
    with pytest.raises(UsageError, match="did you mean counting"):
        list(make_datasets(tmp_path, ["countin"]))
    assert not list(tmp_path.iterdir())


def test_sentences_run_out_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.made.datasets.write_sentence", lambda draws, label: "the same")
    with pytest.raises(UsageError, match="ask for fewer"):
        make_rendered_text(tmp_path / "text", train=2, test=2)
    assert not (tmp_path / "text").exists()


def test_what_is_there_is_kept(tmp_path):
    pytest.importorskip("sklearn")
    assert list(make_datasets(tmp_path, ["digits"])) == ["digits"]
    before = (tmp_path / "digits" / "test" / "0.tar").stat().st_mtime_ns
    assert list(make_datasets(tmp_path, ["digits"])) == ["digits"]
    assert (tmp_path / "digits" / "test" / "0.tar").stat().st_mtime_ns == before
