"""Registry of datasets: one TOML each in assets/datasets/, and those that a user writes.

    title = "CIFAR-10"          kind = "single"       metric = "acc1"
    classes = ["airplane", ["automobile", "car"], ...]       in order; a class may have several names
    [aliases]                   other names that sources use -> the class's first name
    [profiles.paper]            templates, expected counts (splits.test = 10000), and what else differs
    [profiles.clip_benchmark]   the same as CLIP_benchmark has it
    [data]                      a user's own: where the pictures are (`Place`)

Classes are matched by name with what a source calls them, so a source's order of labels does not matter, and a source
with other classes is refused. Nothing here imports torch.
"""

import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from diptych import files
from diptych.config import from_dict
from diptych.errors import DatasetError, NotFoundError, UsageError, unknown_name
from diptych.templates import parse_templates

DatasetKind = Literal["single", "multi", "captions", "frames"]
"""A picture has one label, several, captions; or is a frame of a video, with its neighbours."""
Layout = Literal["auto", "wds", "folders", "parquet", "csv", "shards", "frames"]
METRICS: dict[DatasetKind, tuple[str, ...]] = {
    "single": ("acc1", "acc5", "mean_per_class_recall", "mean_top1_top5", "roc_auc"),
    "multi": ("map_11_point", "mean_average_precision"),
    "captions": ("mean_recall@1",),
    "frames": ("pm0", "pm10"),
}
"""Metrics for each kind of dataset; the first is the default."""
SUITES = ("paper27", "kornblith12", "shifts", "retrieval", "clip_benchmark", "made")
OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where pictures and labels are, and what they are called there."""

    path: str = ""
    """A file or folder, relative to the TOML; or http(s)://..., a folder in the wds layout."""
    repo: str = ""
    """A dataset repository of the Hugging Face hub."""
    layout: Layout = "auto"
    """wds: CLIP_benchmark's WebDataset folders. folders: a folder a class. parquet: also Hugging Face datasets. csv.
    shards: ours. frames: frames.json. auto: what is found."""
    image: str = "image"
    """The column of pictures."""
    label: str = "label"
    """The column of labels."""
    captions: str = "captions"
    """The column of captions."""
    train: str = "train"
    """Name of the train split at the source."""
    val: str = "val"
    test: str = "test"
    order: Literal["names", "registry"] = "names"
    """How its labels are matched with `classes`: by the names that it brings, or number by number."""


SPLIT_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What folders and tables of splits are called, in any case; never classes."""


def find_splits(path: Path) -> dict[str, str]:
    """Words for splits -> what is called so: folders, and tables by what their names begin with."""
    folders = [folder.name for folder in path.iterdir() if folder.is_dir()] if path.is_dir() else []
    tables = [file for pattern in ("*.parquet", "*/*.parquet", "*.csv", "*.tsv") for file in path.glob(pattern)]
    known = {word for words in SPLIT_WORDS.values() for word in words}
    names = [*(re.split(r"[-_.]", file.name)[0] for file in tables), *folders]
    return {name.lower(): name for name in names if name.lower() in known}


def guess_place(path: Path) -> Place:
    """The place of a folder that nothing describes: without a test split the validation split is tested on."""
    there = find_splits(path)
    found = {split: next((there[w] for w in words if w in there), split) for split, words in SPLIT_WORDS.items()}
    if found["val"].lower() in there and found["test"].lower() not in there:
        return Place(train=found["train"], val="none", test=found["val"])
    return Place(train=found["train"], val=found["val"], test=found["test"])


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How one party uses a dataset."""

    templates: str | tuple[str, ...] = ()
    """The name of a list (imagenet_80), or templates; none: those that lie beside the pictures, or a photo of a {}."""
    classes: tuple[str | tuple[str, ...], ...] = ()
    """Names of its own, in an order of its own."""
    metric: str | None = None
    """If it is not the dataset's."""
    prefix: str = ""
    """Before every caption."""
    splits: dict = field(default_factory=dict)
    """Split -> how many pictures it has."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One entry of the registry."""

    id: str
    title: str
    kind: DatasetKind = "single"
    metric: str = ""
    suites: tuple[str, ...] = ()
    paper_row: str = ""
    """Name in the paper's tables."""
    licence: str = ""
    home: str = ""
    wds: str = ""
    """Its repository in CLIP_benchmark's layout."""
    notes: tuple[str, ...] = ()
    """Traps."""
    source: tuple[str, ...] = ()
    """Where class names and templates were taken from."""
    classes: tuple[str | tuple[str, ...], ...] = ()
    """In order; none: those of the source."""
    class_list: str = ""
    """A list that several datasets share, instead of `classes`."""
    subset: tuple[int, ...] = ()
    """The classes of that list that there are."""
    imagenet_groups: tuple[tuple[int, ...], ...] = ()
    """For each class, the classes of ImageNet that it covers."""
    chance: float | None = None
    """Value that guessing reaches, where it does not follow from the metric."""
    split_published: bool = True
    """Whether others can have the paper's split; if not, other counts are a warning only."""
    border: int = 0
    """Pixels to cut off every side."""
    aliases: dict = field(default_factory=dict)
    """Other names in sources -> the first name of the class."""
    profiles: dict = field(default_factory=dict)
    """Name -> Profile."""
    hub: tuple[Place, ...] = ()
    """Where else it lies."""
    data: Place | None = None
    """Place of a custom dataset."""
    ids: tuple[str, ...] = ()
    """Names of the folders of the classes, if a shared list has them."""
    folder: Path | None = None
    """Folder of a custom dataset's TOML file."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Every class as a tuple of its names."""
        return tuple((entry,) if isinstance(entry, str) else entry for entry in self.classes)

    def select_profile(self, wanted: str) -> tuple[str, Profile]:
        """The profile of that name, or else the one that there is."""
        name = wanted if wanted in self.profiles else next(iter(self.profiles))
        return name, self.profiles[name]

    def resolve(self, wanted: str) -> "ResolvedDataset":
        """The dataset as a profile has it."""
        name, profile = self.select_profile(wanted)
        names = tuple((n,) if isinstance(n, str) else n for n in profile.classes)
        templates = (profile.templates,) if isinstance(profile.templates, str) else tuple(profile.templates)
        order = match_classes(self, [n[0] for n in names]) if names and self.classes else range(len(self.classes))
        return ResolvedDataset(
            dataset=self,
            profile=name,
            names=names or self.names,
            order=tuple(order),
            templates=parse_templates(templates or ("a photo of a {}.",)),
            has_templates=bool(templates),
            metric=profile.metric or self.metric,
            prefix=profile.prefix,
            splits=profile.splits,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedDataset:
    """A dataset as a profile has it."""

    dataset: Dataset
    profile: str
    names: tuple[tuple[str, ...], ...]
    """Names of every class, in the profile's order; none: those of the source."""
    order: tuple[int, ...]
    """For each of them its number among the dataset's classes."""
    templates: tuple[str, ...]
    has_templates: bool
    """Whether the profile says so; else those of the source count."""
    metric: str
    prefix: str
    splits: Mapping[str, int]

    def expect(self, split: str, images: int) -> None:
        """Raise DatasetError unless a split has as many pictures as it should."""
        expected = self.splits.get(split)
        if expected is None or expected == images:
            return
        others = [name for name, other in self.dataset.profiles.items() if other.splits.get(split) == images]
        hint = f"; that is the count of the profile {others[0]}" if others else ""
        raise DatasetError(
            f"{self.dataset.id}: {split} has {images:,} pictures, the profile {self.profile} says {expected:,}{hint}"
        )


@cache
def known_datasets() -> tuple[str, ...]:
    """The ids of all datasets that come with diptych, sorted."""
    folder = resources.files("diptych.assets").joinpath("datasets")
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


@cache
def load_dataset_entry(name: str) -> Dataset:
    """An entry by its id."""
    if name not in known_datasets():
        raise unknown_name("dataset", name, known_datasets())
    text = resources.files("diptych.assets").joinpath("datasets", f"{name}.toml").read_text("utf-8")
    return _parse(name, text, f"{name}.toml")


def load_own(path: Path) -> Dataset:
    """A user's own entry, a TOML file."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path} (a TOML that describes a dataset, see docs/evaluate.md)")
    return _parse(path.stem, files.read_bytes(path), str(path), path.parent)


def load_suite(names: Sequence[str]) -> tuple[Dataset, ...]:
    """The datasets of suites, ids and TOML files, each once, in order. A TOML may also list others:
    `datasets = ["cifar10", "mine.toml"]`."""
    found: dict[str, Dataset] = {}
    for name in names:
        for dataset in _load_named(name):
            if found.setdefault(dataset.id, dataset) != dataset:
                raise UsageError(f"two datasets are called {dataset.id}; rename one of the TOML files")
    return tuple(found.values())


def _load_named(name: str) -> tuple[Dataset, ...]:
    if name.endswith(".toml"):
        path = Path(name)
        if path.is_file() and "datasets" in (data := _read_toml(files.read_bytes(path), name)):
            if set(data) != {"datasets"} or not isinstance(data["datasets"], list):
                raise UsageError(f"{name}: a suite is a list `datasets` of ids and TOML files, and nothing else")
            beside = {n: str(path.parent / n) for n in map(str, data["datasets"])}
            own = {n for n in beside if n.endswith(".toml") or (Path(beside[n]).exists() and not _is_known(n))}
            return load_suite([beside[n] if n in own else n for n in beside])
        return (load_own(path),)
    if name in SUITES:
        entries = [load_dataset_entry(known) for known in known_datasets()]
        return tuple(entry for entry in entries if name in entry.suites)
    if name in known_datasets():
        return (load_dataset_entry(name),)
    if Path(name).exists():
        return (_describe_folder(Path(name)),)
    hint = "one of your own is a folder, a table or a TOML (docs/evaluate.md)"
    if "/" in name:
        raise NotFoundError(f"no such dataset: {name}; {hint}")
    raise UsageError(f"{unknown_name('suite or dataset', name, (*SUITES, *known_datasets()))}; {hint}")


def _is_known(name: str) -> bool:
    return name in SUITES or name in known_datasets()


def _describe_folder(path: Path) -> Dataset:
    """A set of one's own that no TOML describes: what lies there says what it is."""
    path = path.resolve()
    kind: DatasetKind = "frames" if (path / "frames.json").is_file() else "single"
    if (stated := path / "dataset_type.txt").is_file():
        said = stated.read_text("utf-8", "replace").strip().lower()
        kind = "captions" if said == "retrieval" else "multi" if said == "multilabel" else kind
    name = path.name if path.is_dir() else path.stem
    place = replace(guess_place(path), path=path.name)
    profiles, metric = {OWN: Profile()}, METRICS[kind][0]
    return Dataset(id=name, title=name, kind=kind, metric=metric, data=place, folder=path.parent, profiles=profiles)


def _read_toml(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no TOML: {error}") from None


def _parse(name: str, text: str | bytes, where: str, folder: Path | None = None) -> Dataset:
    data = _read_toml(text, where)
    try:
        if made := {"id", "ids", "folder"} & data.keys():
            raise UsageError(f"{sorted(made)[0]} is no key of a dataset's TOML")
        kind = data.get("kind", "single")
        if kind not in METRICS:
            raise unknown_name("kind", str(kind), METRICS)
        tables = data.pop("profiles", None) or {OWN: {}}
        profiles = {key: from_dict(Profile, value) for key, value in tables.items()}
        if "class_list" in data:
            data |= _shared_classes(data["class_list"], data.get("subset", []))
        defaults = {"id": name, "title": name, "metric": METRICS[kind][0]}
        if folder is not None:
            defaults["folder"] = str(folder)
        return from_dict(Dataset, defaults | data | {"profiles": profiles})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


@cache
def _load_list(name: str) -> Mapping[str, Any]:
    path = resources.files("diptych.assets").joinpath("datasets", "lists", f"{name}.toml")
    if not path.is_file():
        raise UsageError(f"no list of classes is called {name!r}")
    return tomllib.loads(path.read_text("utf-8"))


def _shared_classes(name: str, subset: Sequence[int]) -> dict[str, Any]:
    """Classes of a shared list, and what their folders are called."""
    shared = _load_list(name)
    count = len(shared["classes"])
    if any(not 0 <= i < count for i in subset) or list(subset) != sorted(set(subset)):
        raise UsageError(f"subset must be rising numbers of the {count} classes of {name}")
    chosen = list(subset) or range(count)
    return {key: [shared[key][i] for i in chosen] for key in ("classes", "ids")}


def _check(entry: Dataset) -> None:
    """Raise UsageError for what contradicts itself."""
    allowed = METRICS[entry.kind]
    for name, profile in entry.profiles.items():
        if profile.metric is not None and profile.metric not in allowed:
            raise unknown_name(f"metric of kind {entry.kind} in profile {name}", profile.metric, allowed)
        if profile.classes and len(profile.classes) != len(entry.classes):
            raise UsageError(f"profile {name} has {len(profile.classes)} classes, the dataset {len(entry.classes)}")
        if any(type(count) is not int or count < 1 for count in profile.splits.values()):
            raise UsageError(f"splits of profile {name} must be counts of pictures, not {profile.splits}")
    if entry.border < 0:
        raise UsageError(f"border {entry.border} must be 0 or more: pixels to cut off every side")
    if entry.metric not in allowed:
        raise unknown_name(f"metric of kind {entry.kind}", entry.metric, allowed)
    if entry.metric == "roc_auc" and len(entry.classes) not in (0, 2):
        raise UsageError(f"roc_auc is for two classes, not {len(entry.classes)}")
    for suite in entry.suites:
        if suite not in SUITES:
            raise unknown_name("suite", suite, SUITES)
    if any(not names for names in entry.names):
        raise UsageError("a class without a name")
    if entry.imagenet_groups and len(entry.imagenet_groups) != len(entry.classes):
        raise UsageError(f"{len(entry.imagenet_groups)} imagenet_groups for {len(entry.classes)} classes")
    firsts = {names[0] for names in entry.names}
    for alias, target in entry.aliases.items():
        if target not in firsts:
            raise unknown_name(f"class that alias {alias!r} stands for", str(target), firsts)


def match_classes(entry: Dataset, found: Sequence[str]) -> list[int]:
    """For each name in `found` the number of the class of `entry.classes` that is called so, by any of its names,
    aliases and ids; raises DatasetError unless they are the same classes. Case and signs count only where they tell
    classes apart (C, C++).

    Of several classes with the same name the first that is found is the first of the registry.
    """
    if len(found) != len(entry.classes):
        count = f"the source has {len(found)} classes, the registry {len(entry.classes)}"
        raise DatasetError(f"{entry.id}: {count}; {_describe_unknown(entry, found)}")
    places = _vocabulary(entry)
    seen = Counter[tuple[int, ...]]()
    numbers: list[int] = []
    for name in found:
        options = _find_classes(places, name)
        if seen[options] >= len(options):
            raise DatasetError(f"{entry.id}: the source has other classes; {_describe_unknown(entry, found)}")
        numbers.append(options[seen[options]])
        seen[options] += 1
    if twice := [name for name, n in zip(found, numbers, strict=True) if numbers.count(n) > 1]:
        raise DatasetError(f"{entry.id}: {twice[0]!r} and {twice[1]!r} of the source are one class of the registry")
    return numbers


def match_names(entry: Dataset, found: Sequence[str]) -> dict[str, int]:
    """Class numbers by name, for names that may lack some of the classes, such as labels written out."""
    places = _vocabulary(entry)
    numbers = {name: _find_classes(places, name) for name in found}
    if unknown := [name for name, options in numbers.items() if len(options) != 1]:
        why = "is no class of the registry" if _fold(unknown[0]) not in places[-1] else "names several classes"
        raise DatasetError(f"{entry.id}: {unknown[0]!r} {why}; {_describe_unknown(entry, found)}")
    return {name: options[0] for name, options in numbers.items()}


Vocabulary = tuple[dict[str, tuple[int, ...]], ...]
"""For each of `_SPELLINGS`: names that a source may use for a class -> its number, or several."""


def _find_classes(places: Vocabulary, name: str) -> tuple[int, ...]:
    """The class that is called so, by the closest spelling; several if they have one name, none if it is left open
    which of several with other names is meant."""
    spelled = (table.get(spell(name), ()) for spell, table in zip(_SPELLINGS, places, strict=True))
    options = next(filter(None, spelled), ())
    return options if len(options) < 2 or options in places[0].values() else ()


def _vocabulary(entry: Dataset) -> Vocabulary:
    words = [list(names) for names in entry.names]
    of_first = {names[0]: number for number, names in reversed(list(enumerate(entry.names)))}
    for alias, target in entry.aliases.items():
        words[of_first[target]].append(alias)
    for number, folder in enumerate(entry.ids):
        words[number] += [folder] if entry.subset else [folder, str(number)]
    places: Vocabulary = tuple({} for _ in _SPELLINGS)
    for spell, table in zip(_SPELLINGS, places, strict=True):
        for number, several in enumerate(words):
            for word in dict.fromkeys(map(spell, several)):
                table[word] = (*table.get(word, ()), number)
    return places


def _describe_unknown(entry: Dataset, found: Sequence[str]) -> str:
    """Which names only one of both has."""
    places, folded = _vocabulary(entry)[-1], {_fold(name) for name in found}
    here = {number for name in folded for number in places.get(name, ())}
    unknown = [name for name in found if _fold(name) not in places]
    missing = [names[0] for number, names in enumerate(entry.names) if number not in here]
    say = [f"only the source has {', '.join(map(repr, unknown[:3]))}"] if unknown else []
    say += [f"it lacks {', '.join(map(repr, missing[:3]))}"] if missing else []
    return "; ".join(say) or "some names come more often than there"


def _fold(name: str) -> str:
    """Letters and digits only, in lower case, without accents."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(sign for sign in plain if sign.isalnum())


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)


_SPELLINGS = (_compose, lambda name: _compose(name.casefold()), _fold)
"""From the closest to the widest: as it is written, without case, without signs and accents."""
