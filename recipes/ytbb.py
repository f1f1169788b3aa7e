"""YTBB-Robust's annotations as a frames.json. `python -m recipes.ytbb METADATA FRAMES`.

METADATA is the folder of its authors' annotations: ytbb_class_index.json, ytbb_robustness_test_anchors_full.csv,
anchor_labels.json and pmk_labels.json, as mlfoundations/wise-ft has them. FRAMES holds the pictures, a folder for each
anchor (VIDEO_MILLISECONDS/frame-NUMBER.jpg); frames.json is written into it, and it is what `diptych evaluate` takes as
the dataset ytbb_robust.

The rules are its authors': an anchor counts if people found it good and never bad, and no pair called it a bad anchor.
Its labels are those that people gave it and that of the video. A frame at most ten away belongs to it if people found
the two similar and had nothing against the pair. An annotation that comes twice counts as it comes last.
"""

import csv
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import tyro

from diptych import files
from diptych.cli import exit_on_error
from diptych.errors import NotFoundError, UsageError
from diptych.evaluate.datasets.layouts import read_json

AGAINST = {
    "dissimilar",
    "problematic",
    "incorrect",
    "dont know",
    "deformation",
    "background-change",
    "occlusion-increased",
    "blur-increase",
    "bad-anchor",
}
"""What people may have against a pair of frames."""
SWAPPED = {22: 23, 23: 22}
"""In the table of anchors two classes have each other's number: `none` and `car`."""
REACH = 10
"""Frames before and after an anchor."""


@dataclass(frozen=True)
class Convert:
    """Write YTBB-Robust's frames.json."""

    metadata: Annotated[Path, tyro.conf.Positional]
    """The folder of the annotations."""
    frames: Annotated[Path, tyro.conf.Positional]
    """The folder of the pictures."""


def main(config: Convert) -> Path:
    """Read the annotations, keep what counts, write frames.json; a picture that is not there is an error."""
    folder = config.metadata
    index = read_json(folder / "ytbb_class_index.json")
    classes = [index[str(number)] for number in range(len(index))]
    anchors = read_annotations(folder / "anchor_labels.json")
    pairs = read_annotations(folder / "pmk_labels.json")
    frames = build_frames(classes, read_videos(folder / "ytbb_robustness_test_anchors_full.csv"), anchors, pairs)
    wanted = {frame for anchor, others in frames["sets"].items() for frame in (anchor, *others)}
    if missing := sorted(frame for frame in wanted if not (config.frames / frame).is_file()):
        raise NotFoundError(f"{config.frames} lacks {len(missing)} of {len(wanted)} frames, {missing[0]} among them")
    path = config.frames / "frames.json"
    files.write_bytes(path, json.dumps(frames).encode())
    return path


def build_frames(
    classes: list[str],
    of_video: Mapping[str, int],
    anchors: Mapping[str, Set[str]],
    pairs: Mapping[str, Set[str]],
) -> dict[str, Any]:
    """What frames.json holds, from annotations: of anchors by frame, of pairs by "anchor,frame"."""
    split = {key: tuple(map(short, key.split(","))) for key in pairs}
    bad = {split[key][0] for key, said in pairs.items() if "bad-anchor" in said}
    similar = {split[key] for key, said in pairs.items() if "similar" in said and not said & AGAINST}
    labels, sets = {}, {}
    for key, said in anchors.items():
        anchor = short(key)
        if "good" not in said or said & {"bad", "unsure"} or anchor in bad:
            continue
        folder, name = anchor.split("/")
        if folder not in of_video:
            raise UsageError(f"the anchor {anchor} is not in the table of anchors")
        place = int(name.removeprefix("frame-").removesuffix(".jpg"))
        around = [f"{folder}/frame-{place + i}.jpg" for i in range(-REACH, REACH + 1) if i]
        labels[anchor] = sorted({of_video[folder], *(classes.index(one) for one in said if one in classes)})
        sets[anchor] = [frame for frame in around if (anchor, frame) in similar]
    return {"classes": classes, "labels": labels, "sets": sets}


def read_annotations(path: Path) -> dict[str, set[str]]:
    """What people said of each key."""
    found = read_json(path)
    names = found["labels"]
    return {row["key"]: {names[number] for number in row["labels"]} for row in found["annotations"]}


def read_videos(path: Path) -> dict[str, int]:
    """VIDEO_MILLISECONDS -> the class of the table of anchors."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    with path.open(newline="", encoding="utf-8") as lines:
        rows = [(f"{row['ytid']}_{row['time_ms']}", int(row["label"])) for row in csv.DictReader(lines)]
    return {key: SWAPPED.get(label, label) for key, label in rows}


def short(path: str) -> str:
    """A frame as FOLDER/NAME, whatever stands before."""
    return "/".join(PurePosixPath(path).parts[-2:])


if __name__ == "__main__":
    with exit_on_error():
        print(main(tyro.cli(Convert, description=__doc__)))
