"""From a place on this machine to samples: where each picture lies, and what is known of it.

    wds        classnames.txt, test/nshards.txt, test/0.tar ... with .cls, .npy (several labels) or .txt (captions)
    folders    test/CLASS/*.jpg, or CLASS/*.jpg
    parquet    test-00000-of-00002.parquet ...: also Hugging Face datasets (a struct, class names in the schema)
    csv        test.csv, or a column `split`: a path to a picture, a label
    shards     ours, with `label` or `captions` in the details
    frames     frames.json or metadata/labels.json and pmsets.json: frames of videos, and which are neighbours

Damage and missing parts are an error with a reason, since a set that is nearly whole gives numbers that are nearly
right; a caller who only watches a number change may have them counted instead. Pictures themselves are looked at when
they are embedded. A train split may be divided into folds by a file fold_indices.txt, as STL-10's authors give it: a
line for each, with the places of its pictures, from 0.

Nothing here imports torch.
"""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych import files
from diptych.embed.sources import Extent, Row, leaves_folder
from diptych.errors import DatasetError, NotFoundError, ShardError, UsageError
from diptych.evaluate.datasets.registry import DatasetKind, Place, find_splits
from diptych.evaluate.datasets.samples import NUMBER, Label, ListedRows, Samples, plain_label
from diptych.evaluate.datasets.tables import CSV_SUFFIXES, open_csv, open_parquet
from diptych.image_file import IMAGE_SUFFIXES, find_images, is_hidden
from diptych.shards.dataset import load_dataset
from diptych.shards.index import MAX_TEXT_BYTES, is_metadata_of_macos
from diptych.shards.members import Member, iter_members

FOLDS = "fold_indices.txt"
MAX_SHARDS = 1_000_000
"""Shards of a split that nshards.txt may announce."""
CLASSNAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"


def open_samples(
    place: Place, root: Path, split: str, kind: DatasetKind, on_damage: Literal["stop", "count"] = "stop"
) -> Samples:
    """Open a split; NotFoundError if it is not there, DatasetError if it is damaged or contradicts itself.

    With `on_damage="count"` damaged and missing parts are counted among the skipped samples.
    """
    path = root / place.path if place.path else root
    if not path.exists():
        raise NotFoundError(f"no such dataset: {path}")
    layout = place.layout if place.layout != "auto" else find_layout(path, kind)
    name = name_of_split(place, split)
    try:
        samples = _OPEN[layout](path, name, place, kind)
    except NotFoundError as error:
        there = ", ".join(find_splits(path).values())
        hint = f'; there is {there}: name it in [data] of a TOML, such as test = "validation"' if there else ""
        raise NotFoundError(f"{error}{hint}") from None
    samples.layout = layout
    keys = Counter(samples.keys)
    if repeated := [key for key, count in keys.items() if count > 1]:
        samples.damage.append(
            ("", f"{path}: {len(repeated)} keys come more than once ({repeated[0]}); one part is there twice")
        )
    if samples.damage and on_damage == "stop":
        raise DatasetError(samples.damage[0][1])
    samples.skipped.update(reason for reason, _ in samples.damage if reason)
    if not len(samples):
        counts = ", ".join(f"{what} {count:,}" for what, count in (samples.skipped + samples.passed_over).items())
        odd = f"; a label is {samples.odd_label}" if samples.odd_label else ""
        raise DatasetError(f"{path} has no usable picture in {name}: {counts or 'nothing found'}{odd}")
    if split == "train" and (path / FOLDS).is_file():
        samples.folds = _read_folds(path / FOLDS, samples)
    return samples


def _read_folds(path: Path, samples: Samples) -> tuple[tuple[int, ...], ...]:
    """Folds of a train split; DatasetError for what is none, or does not count these samples."""
    try:
        folds = tuple(tuple(int(place) for place in line.split()) for line in _read_lines(path) if line)
    except ValueError:
        raise DatasetError(f"{path} has something that is no number; a line is a fold: places of pictures") from None
    places = [place for fold in folds for place in fold]
    if not places or min(places) < 0 or max(places) >= len(samples):
        raise DatasetError(
            f"{path} has places up to {max(places, default=0):,}, the train split has {len(samples):,} pictures; "
            "places count from 0"
        )
    if samples.skipped:
        raise DatasetError(f"{path} counts pictures, but {samples.skipped.total()} have no usable label and no place")
    return folds


def name_of_split(place: Place, split: str) -> str:
    """Name of a split at the source."""
    return {"train": place.train, "val": place.val, "test": place.test}[split]


def find_layout(path: Path, kind: DatasetKind) -> str:
    """The layout of what lies at a path; NotFoundError if it is none."""
    if path.is_file():
        known = {".parquet": "parquet", ".tar": "shards", **dict.fromkeys((*CSV_SUFFIXES, ".jsonl"), "csv")}
        if path.suffix.lower() in known:
            return known[path.suffix.lower()]
    elif kind == "frames":
        return "frames"
    elif any((path / name).is_file() for name in (CLASSNAMES, TYPE, "test/nshards.txt", "train/nshards.txt")):
        return "wds"
    elif any(path.rglob("*.parquet")):
        return "parquet"
    elif any(any(path.glob(f"*{suffix}")) for suffix in CSV_SUFFIXES):
        return "csv"
    elif any(path.glob("*.tar")) or any(path.glob("*/*.tar")):
        return "shards"
    elif any(folder.is_dir() for folder in path.iterdir()):
        return "folders"
    raise NotFoundError(f"{path} holds no dataset of a known layout (wds, class folders, parquet, csv, shards)")


# --- CLIP_benchmark's WebDataset folders ---


def _open_wds(path: Path, split: str, place: Place, kind: DatasetKind) -> Samples:
    folder = path / split
    if not folder.is_dir():
        if split != place.test or not any(path.glob("*.tar")):
            raise NotFoundError(f"{path} has no split {split}")
        folder = path
    stated = (
        (path / TYPE).read_text("utf-8", "replace").strip().lower() if (path / TYPE).is_file() else "classification"
    )
    expected = {"captions": "retrieval", "multi": "multilabel"}.get(kind, "classification")
    if stated != expected:
        raise DatasetError(f"{path / TYPE} says {stated}, the dataset is of kind {kind} ({expected})")
    samples = Samples(path, "wds")
    if kind != "captions" and (path / CLASSNAMES).is_file():
        samples.classnames = _read_lines(path / CLASSNAMES)
    if (path / TEMPLATES).is_file():
        samples.templates = tuple(line.replace("{c}", "{}") for line in _read_lines(path / TEMPLATES))
    rows: list[Row] = []
    for tar in _wds_shards(folder, samples):
        _read_wds_shard(tar, kind, samples, rows)
    samples.rows = ListedRows(rows)
    return samples


def _read_lines(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in files.read_text(path).splitlines())


def _wds_shards(folder: Path, samples: Samples) -> list[Path]:
    """The shards that nshards.txt announces, or all that there are; whatever does not agree is noted as damage."""
    found = sorted(folder.glob("*.tar"))
    try:
        count = int((folder / "nshards.txt").read_text("utf-8", "replace").strip())
    except FileNotFoundError:
        samples.damage.append(("", f"{folder} has no nshards.txt, so a missing shard could not be noticed"))
        return found
    except ValueError:
        raise DatasetError(f"{folder / 'nshards.txt'} is no number") from None
    if count > MAX_SHARDS:
        raise DatasetError(f"{folder / 'nshards.txt'} announces {count:,} shards, at most {MAX_SHARDS:,}")
    shards = [folder / f"{number}.tar" for number in range(count)]
    missing = [shard for shard in shards if not shard.is_file()]
    names = ", ".join(shard.name for shard in missing[:3])
    samples.damage += [("missing_shard", f"{folder} lacks {len(missing)} of {count} shards: {names}")] * len(missing)
    unknown = [shard for shard in found if shard not in shards]
    if unknown:
        said = f"{folder / 'nshards.txt'} says {count} shards, but there is {unknown[0].name} too"
        samples.damage.append(("", said))
    return [shard for shard in shards if shard not in missing] + unknown


def _read_wds_shard(tar: Path, kind: DatasetKind, samples: Samples, rows: list[Row]) -> None:
    found: dict[str, dict[str, Member]] = {}
    for member in iter_members(tar):
        if not isinstance(member, Member):
            if member.reason != "zero_blocks":  # two tars in one: nothing is lost
                said = f"{tar} is damaged at byte {member.offset:,} ({member.reason}); fetch it again"
                samples.damage.append((member.reason, said))
            continue
        if is_metadata_of_macos(member.name):
            continue
        stem, _, suffix = member.name.rpartition(".")
        if suffix.lower() in found.setdefault(stem, {}):
            samples.damage.append(("duplicate_key", f"{tar} has {member.name} twice"))
            continue
        found[stem][suffix.lower()] = member
    classes = len(samples.classnames or ())
    suffix, before = {"captions": "txt", "multi": "npy"}.get(kind, "cls"), set(samples.keys)
    with open(tar, "rb") as handle:
        for key, members in found.items():
            picture = next((member for end, member in members.items() if f".{end}" in IMAGE_SUFFIXES), None)
            if picture is None or suffix not in members:
                samples.skipped["no_image" if picture is None else "no_label"] += 1
                continue
            handle.seek(members[suffix].offset)
            data = handle.read(min(members[suffix].size, MAX_TEXT_BYTES))
            label = _read_label(data, kind, samples.classnames or ())
            if classes and isinstance(label, int) and label >= classes:
                said = f"{tar}: {key} is of class {label}, but {CLASSNAMES} names {classes} classes, 0 to {classes - 1}"
                samples.damage.append(("bad_label", said))
                continue
            if label is None:
                samples.skip_label(data, f".{suffix}")
                continue
            name = f"{tar.stem}/{key}" if key in before else key  # some writers count from 0 in every shard
            samples.keys.append(name)
            samples.labels.append(label)
            rows.append(Row(name, Extent(tar, picture.offset, picture.size, None)))


def _read_label(data: bytes, kind: DatasetKind, classnames: Sequence[str]) -> Label | None:
    """Label in a .cls, .npy or .txt; None if it is no label, or not the name of one of the classes."""
    if kind == "captions":
        captions = tuple(line for line in data.decode("utf-8", "replace").splitlines() if line.strip())
        return captions or None
    if kind == "multi":
        try:
            vector = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            return None
        fits = vector.ndim == 1 and len(vector) == (len(classnames) or len(vector)) and np.isin(vector, (0, 1)).all()
        return tuple(np.flatnonzero(vector).tolist()) if fits else None
    text = data.strip().decode("utf-8", "replace")
    if match := NUMBER.fullmatch(text):
        return None if match[1] else int(match[2])
    if text in classnames:
        return classnames.index(text)
    return text if not classnames and text.isprintable() and not text[:1].isdigit() and text else None


# --- folders of pictures ---


def _open_folders(path: Path, split: str, _place: Place, kind: DatasetKind) -> Samples:
    if kind != "single":
        raise UsageError(f"{path}: folders of classes give one label to each picture, the dataset is of kind {kind}")
    if (path / split).is_dir():
        root = path / split
    else:
        root = path
        if split != "test" or find_splits(path):
            raise NotFoundError(f"{path} has no split {split}")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not is_hidden(folder.name))
    if len(folders) == 1:
        raise DatasetError(
            f"{root} has one class folder, {folders[0].name}: nothing to tell apart; name the folder above the classes"
        )
    samples = Samples(path, "folders", classnames=tuple(folder.name for folder in folders))
    rows = []
    for number, folder in enumerate(folders):
        names, others = find_images(folder)
        samples.passed_over += others
        for name in names:
            key = f"{folder.name}/{Path(name).as_posix()}"
            samples.keys.append(key)
            samples.labels.append(number)
            rows.append(Row(key, folder / name))
    samples.rows = ListedRows(rows)
    return samples


# --- our shards ---


def _open_shards(path: Path, split: str, place: Place, kind: DatasetKind) -> Samples:
    if path.is_dir() and (path / split).is_dir():
        path = path / split
    elif split != "test":
        raise NotFoundError(f"{path} has no split {split}")
    try:
        dataset = load_dataset(path, captionless=True)
    except ShardError as error:
        raise DatasetError(str(error)) from None
    samples, rows = Samples(path, "shards"), []
    for shard, key, reason in dataset.skipped:
        if reason in ("truncated", "damaged_header"):
            samples.damage.append((reason, f"{shard} is damaged at {key} ({reason}); fetch it again"))
        else:
            samples.skipped[reason] += 1
    for shard in dataset.shards:
        before = set(samples.keys)
        for row in shard.table.select(["key", "caption", "details", "offset", "size", "xxh3"]).to_pylist():
            if row["key"] in dataset.deleted:
                samples.skipped["deleted"] += 1
                continue
            details = files.parse_json(row["details"])
            value = (details.get(place.captions) or row["caption"]) if kind == "captions" else details.get(place.label)
            parsed = plain_label(value, kind, 0)
            if parsed is None:
                if kind == "captions":
                    samples.skipped["no_caption"] += 1
                else:
                    samples.skip_label(value, "in the JSON")
                continue
            key = f"{shard.path.stem}/{row['key']}" if row["key"] in before else row["key"]  # as in the wds layout
            samples.keys.append(key)
            samples.labels.append(parsed)
            rows.append(Row(key, Extent(shard.path, row["offset"], row["size"], row["xxh3"])))
    samples.rows = ListedRows(rows)
    return samples


# --- frames ---


def _open_frames(path: Path, split: str, place: Place, kind: DatasetKind) -> Samples:
    """frames.json: {"labels": {frame: [classes]}, "sets": {anchor: [neighbours]}}, frames being paths of pictures; a
    neighbour without labels has its anchor's. Or what ImageNet-Vid-Robust calls its files."""
    if kind != "frames":
        raise UsageError(f"{path}: frames.json is for datasets of kind frames, not {kind}")
    if split != place.test:
        raise NotFoundError(f"{path} has no split {split}: frames are for testing")
    groups: tuple[tuple[int, ...], ...] = ()
    if (path / "frames.json").is_file():
        data = read_json(path / "frames.json")
        if not isinstance(data, dict):
            raise DatasetError(f"{path / 'frames.json'} is no table of labels and sets")
        labels, sets, names = data.get("labels"), data.get("sets"), data.get("classes")
    elif (path / "metadata" / "pmsets.json").is_file():
        labels, sets = read_json(path / "metadata" / "labels.json"), read_json(path / "metadata" / "pmsets.json")
        index = read_json(path / "misc" / "imagenet_vid_class_index.json")
        names = [index[str(number)][1] for number in range(len(index))]
        groups = _read_groups(path / "misc", index)
    else:
        raise NotFoundError(f"{path} has neither frames.json nor metadata/pmsets.json")
    if not isinstance(labels, dict) or not isinstance(sets, dict) or not sets or not all(map(_is_names, sets.values())):
        raise DatasetError(f"{path}: frames need `labels` (frame: classes) and `sets` (anchor: list of frames)")
    if names is not None and not _is_names(names):
        raise DatasetError(f"{path}: `classes` of frames is no list of names")
    if outside := next((one for anchor, some in sets.items() for one in (anchor, *some) if leaves_folder(one)), None):
        raise DatasetError(f"{path}: frame {outside} lies outside of the dataset")
    samples = Samples(path, "frames", classnames=tuple(names) if names else None, imagenet_groups=groups)
    rows = []
    samples.sets = {anchor: tuple(neighbours) for anchor, neighbours in sets.items()}
    wanted = dict.fromkeys(frame for anchor, others in samples.sets.items() for frame in (anchor, *others))
    of_anchor = {frame: anchor for anchor, others in samples.sets.items() for frame in others}
    for frame in wanted:
        value = labels.get(frame) or labels.get(of_anchor.get(frame, ""))
        parsed = plain_label(value, "multi", len(samples.classnames or ()))
        if not parsed:
            raise DatasetError(f"{path}: frame {frame} has no label, and its anchor has none")
        samples.keys.append(frame)
        samples.labels.append(parsed)
        rows.append(Row(frame, path / frame))
    samples.rows = ListedRows(rows)
    return samples


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read_groups(folder: Path, index: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """ImageNet's classes in each class of ImageNet-Vid-Robust, as its own files say; none if they are not there."""
    if not all((folder / name).is_file() for name in ("rev_wnid_map.json", "imagenet_class_index.json")):
        return ()
    synsets, imagenet = read_json(folder / "rev_wnid_map.json"), read_json(folder / "imagenet_class_index.json")
    number = {synset: int(place) for place, (synset, _) in imagenet.items()}
    try:
        return tuple(tuple(sorted(number[s] for s in synsets[index[str(i)][0]])) for i in range(len(index)))
    except KeyError as error:
        raise DatasetError(f"{folder}: no class {error} in rev_wnid_map.json or imagenet_class_index.json") from None


def read_json(path: Path) -> Any:
    """A JSON file of a dataset; DatasetError for one that is missing or is none."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    except ValueError as error:
        raise DatasetError(f"{path} is no JSON: {error}") from None


_OPEN: Mapping[str, Callable[[Path, str, Place, DatasetKind], Samples]] = {
    "wds": _open_wds,
    "folders": _open_folders,
    "parquet": open_parquet,
    "csv": open_csv,
    "shards": _open_shards,
    "frames": _open_frames,
}
