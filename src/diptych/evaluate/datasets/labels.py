"""From what a source says of a picture to the number of its class, in the order of a profile.

Names are matched, never positions: a source whose classes are in another order gives the same labels, one with other
classes is refused. Nothing here imports torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diptych.errors import DatasetError
from diptych.evaluate.datasets.registry import OWN, Dataset, Place, ResolvedDataset, match_classes, match_names
from diptych.evaluate.datasets.samples import NUMBER, Samples

Several = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class ClassIndex:
    """Labels as class numbers, and what the classes are called."""

    numbers: tuple[tuple[int, ...], ...]
    """Classes of every sample; one each if the dataset is of kind single."""
    names: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    warnings: tuple[str, ...] = ()


NO_CLASSES = ClassIndex(numbers=(), names=(), templates=())
"""Classes of a dataset of captions: none."""


def index_labels(used: ResolvedDataset, samples: Samples, place: Place) -> ClassIndex:
    """Give every label its number; raises DatasetError for classes that are not the registry's."""
    entry = used.dataset
    labels = _read_numbers(entry, [one if isinstance(one, tuple) else (one,) for one in samples.labels])
    templates = used.templates
    if samples.templates and (used.profile == "clip_benchmark" or (used.profile == OWN and not used.has_templates)):
        templates = samples.templates  # CLIP_benchmark takes what lies beside the pictures
    if not entry.classes:
        numbers, names = _classes_of_source(entry, samples, labels)
        return ClassIndex(numbers=numbers, names=names, templates=templates)
    if used.profile == "clip_benchmark" and samples.layout == "wds" and samples.classnames:
        names = tuple((name,) for name in samples.classnames)
        return ClassIndex(
            numbers=_checked(entry, labels, samples.classnames),
            names=names,
            templates=templates,
            warnings=_compare(entry, samples.classnames),
        )
    place_of = {base: number for number, base in enumerate(used.order)}
    base = _base_numbers(entry, samples, place, labels)
    numbers = tuple(tuple(place_of[n] for n in several) for several in base)
    return ClassIndex(numbers=numbers, names=used.names, templates=templates)


def align_classes(index: ClassIndex, test: ClassIndex, split: str) -> ClassIndex:
    """The labels of another split, in the order of the test split's classes: a class is its name, never a place in a
    list. Raises DatasetError if the two do not have the same classes."""
    if index.names == test.names:
        return index
    mine, theirs = ([names[0] for names in one.names] for one in (index, test))
    alone = [(split, sorted(set(mine) - set(theirs))), ("test", sorted(set(theirs) - set(mine)))]
    if any(names for _, names in alone) or len(set(mine)) < len(mine):
        said = "; ".join(f"only in {where}: {', '.join(names[:5])}" for where, names in alone if names)
        raise DatasetError(f"the classes of {split} are not those of test ({said or 'one is there twice'})")
    place = [theirs.index(name) for name in mine]
    numbers = tuple(tuple(place[number] for number in several) for several in index.numbers)
    return replace(index, numbers=numbers, names=test.names)


def _classes_of_source(
    entry: Dataset, samples: Samples, labels: Sequence[Several]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[str, ...], ...]]:
    """For a dataset that lists no classes: those that its source names, or has."""
    if samples.classnames:
        names = samples.classnames
        numbers = _checked(entry, labels, names)
    else:
        strings = {one for several in labels for one in several if isinstance(one, str)}
        if not strings or any(isinstance(one, int) for several in labels for one in several):
            raise DatasetError(
                f"{entry.id}: labels are numbers, and nothing says what they are called; give `classes` in its TOML, "
                'and order = "registry" in [data]'
            )
        names = tuple(sorted(strings))
        number = {name: i for i, name in enumerate(names)}
        numbers = tuple(tuple(number[str(one)] for one in several) for several in labels)
    if entry.kind == "single" and len(names) == 1:
        raise DatasetError(f"{entry.id} has one class, {names[0]}: nothing to tell apart")
    spelled = [name.replace("_", " ") for name in names] if samples.layout == "folders" else names
    return numbers, tuple((name,) for name in spelled)


def _base_numbers(
    entry: Dataset, samples: Samples, place: Place, labels: Sequence[Several]
) -> tuple[tuple[int, ...], ...]:
    """Numbers in the order of `entry.classes`."""
    named = any(isinstance(one, str) for several in labels for one in several)
    if named:
        number = match_names(entry, sorted({str(one) for several in labels for one in several}))
        return tuple(tuple(number[str(one)] for one in several) for several in labels)
    if place.order == "registry":
        return _checked(entry, labels, [names[0] for names in entry.names])
    if not samples.classnames:
        raise DatasetError(
            f"{entry.id}: labels are numbers, and the source does not say what they are called; if they count the "
            'classes of the registry, in its order, say so: order = "registry" in [data] of a TOML'
        )
    order = match_classes(entry, samples.classnames)
    return tuple(tuple(order[n] for n in several) for several in _checked(entry, labels, samples.classnames))


def _read_numbers(entry: Dataset, labels: list[Several]) -> list[Several]:
    """Labels as numbers where all are numbers that are written out, unless classes are called so."""
    found = {one for several in labels for one in several}
    if not found or not all(isinstance(one, str) and NUMBER.fullmatch(one.strip()) for one in found):
        return labels
    if found <= {name for names in entry.names for name in names}:
        return labels
    return [tuple(int(float(one)) for one in several) for several in labels]


def _checked(entry: Dataset, labels: Sequence[Several], names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Labels that are numbers of classes, or their names."""
    number = {name: i for i, name in reversed(list(enumerate(names)))}
    for several in labels:
        for one in several:
            if one not in number and not (isinstance(one, int) and 0 <= one < len(names)):
                raise DatasetError(f"{entry.id}: {one!r} is no number of one of {len(names)} classes, nor its name")
    return tuple(tuple(one if isinstance(one, int) else number[one] for one in several) for several in labels)


def _compare(entry: Dataset, classnames: tuple[str, ...]) -> tuple[str, ...]:
    """CLIP_benchmark's profile takes the names of the source; it is said if they are not the registry's."""
    if len(classnames) != len(entry.classes):
        match_classes(entry, classnames)  # raises
    try:
        match_classes(entry, classnames)
    except DatasetError as error:
        return (f"class names of the source are not those of the registry: {error}",)
    return ()


_ODD_NAMES: Mapping[str, str] = {
    r"n\d{8}": "WordNet's numbers",
    r"-?\d+(\.0+)?": "numbers",
    r"\d+[._ ]+\D.*": "numbered",
    r"([A-Z][a-z]+){2,}": "words written together",
}
"""What names that are none look like, and what that is called."""


def doubt_names(names: Sequence[str]) -> tuple[str, ...]:
    """A warning if the source's names of classes are not as people write them; nothing else tells a model what they
    mean."""
    for pattern, said in _ODD_NAMES.items():
        alike = [name for name in names if re.fullmatch(pattern, name)]
        if 4 * len(alike) > len(names):
            return (
                f"class names are {said}, such as {alike[0]!r}, and were asked so: write what they mean into "
                "`classes` of a TOML (docs/evaluate.md)",
            )
    return ()
