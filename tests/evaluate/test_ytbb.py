"""YTBB-Robust's annotations to frames.json, by hand."""

import json
import subprocess
import sys

import pytest
from exams import pictures
from recipes import ytbb

from diptych.errors import DatasetError, NotFoundError, UsageError
from diptych.evaluate.datasets.layouts import open_samples
from diptych.evaluate.datasets.registry import Place, load_dataset_entry

ANCHORS = ["good", "bad", "unsure", "horse", "person"]
PAIRS = ["similar", "dissimilar", "blur-increase", "bad-anchor", "correct"]


@pytest.fixture
def annotated(tmp_path):
    """Three anchors that count (a, b, and c whose video is of the class `none`), four that do not."""
    metadata, frames = tmp_path / "metadata", tmp_path / "frames"
    metadata.mkdir()
    classes = load_dataset_entry("ytbb_robust").classes
    (metadata / "ytbb_class_index.json").write_text(json.dumps({str(i): str(name) for i, name in enumerate(classes)}))
    videos = {"a": 0, "b": 22, "c": 23, "bad": 1, "unsure": 1, "unseen": 1, "disliked": 1}
    table = [f"{video},100,{label}" for video, label in videos.items()]
    (metadata / "ytbb_robustness_test_anchors_full.csv").write_text("\n".join(["ytid,time_ms,label", *table]))
    said = {"a": [0, 3], "b": [0], "c": [0], "bad": [0, 1], "unsure": [0, 2], "unseen": [3], "disliked": [0]}
    anchors = [{"key": f"some/where/{video}_100/frame-20.jpg", "labels": labels} for video, labels in said.items()]
    first = {"key": "a_100/frame-20.jpg", "labels": [1]}  # said once more below, which counts
    write(metadata / "anchor_labels.json", ANCHORS, [{**first, "key": anchors[0]["key"]}, *anchors])
    pairs = [
        pair("a", 19, 0),
        pair("a", 30, 0, 4),
        pair("a", 31, 0),  # too far away
        pair("a", 18, 0, 2),  # blurred
        pair("a", 17, 4),  # not called similar
        pair("b", 21, 1),
        pair("disliked", 19, 3),
    ]
    write(metadata / "pmk_labels.json", PAIRS, pairs)
    data = pictures()[0][2]
    for name in ("a_100/frame-20", "a_100/frame-19", "a_100/frame-30", "b_100/frame-20", "c_100/frame-20"):
        path = frames / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return ytbb.Convert(metadata, frames)


def pair(video, frame, *labels):
    return {"key": f"x/{video}_100/frame-20.jpg,x/{video}_100/frame-{frame}.jpg", "labels": list(labels)}


def write(path, labels, annotations):
    path.write_text(json.dumps({"labels": labels, "annotations": annotations}))


def test_what_people_found_good_and_similar_stays(annotated):
    found = json.loads(ytbb.main(annotated).read_bytes())
    names = found["classes"]
    assert found["sets"] == {
        "a_100/frame-20.jpg": ["a_100/frame-19.jpg", "a_100/frame-30.jpg"],
        "b_100/frame-20.jpg": [],
        "c_100/frame-20.jpg": [],
    }
    said = {anchor[0]: {names[number] for number in numbers} for anchor, numbers in found["labels"].items()}
    assert said == {"a": {"person", "horse"}, "b": {"car"}, "c": {"none"}}


def test_what_was_written_is_a_dataset_of_frames(annotated):
    ytbb.main(annotated)
    samples = open_samples(Place(), annotated.frames, "test", "frames")
    assert len(samples) == 5
    assert samples.sets["a_100/frame-20.jpg"] == ("a_100/frame-19.jpg", "a_100/frame-30.jpg")
    assert samples.labels[samples.keys.index("a_100/frame-19.jpg")] == (0, 10)


def test_frames_and_anchors_that_are_not_there_are_named(annotated):
    table = annotated.metadata / "ytbb_robustness_test_anchors_full.csv"
    table.write_text(table.read_text().replace("b,100", "d,100"))
    with pytest.raises(UsageError, match=r"anchor b_100/frame-20\.jpg is not in the table"):
        ytbb.main(annotated)
    table.write_text(table.read_text().replace("d,100", "b,100"))
    (annotated.frames / "a_100/frame-30.jpg").unlink()
    with pytest.raises(NotFoundError, match=r"lacks 1 of 5 frames, a_100/frame-30\.jpg"):
        ytbb.main(annotated)
    (annotated.metadata / "pmk_labels.json").write_text("{")
    with pytest.raises(DatasetError, match="is no JSON"):
        ytbb.main(annotated)


def test_an_error_of_a_recipe_is_one_line(tmp_path):
    command = [sys.executable, "-m", "recipes.ytbb", str(tmp_path / "none"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"diptych: {tmp_path}/none/ytbb_class_index.json is missing\n"
