"""Robustness to natural shifts (paper section 3.3): what an accuracy under a shift is worth beside that on ImageNet.

Accuracies of models that were trained on ImageNet lie on a line when both axes are logits (Taori et al. 2020). How far
a model lies above it is its effective robustness; what an intervention changes under the shift is its relative
robustness. The line is fitted from a table that the user supplies: no table of such models is shipped.

    model,imagenet,imagenet_v2,imagenet_a,imagenet@imagenet_a       a CSV; shares or percent, a cell may be empty
    resnet50,76.1,63.2,0.0,91.5                                     imagenet@SHIFT: on that shift's classes only
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych import files
from diptych.errors import NotFoundError, UsageError

IMAGENET = "imagenet"


@dataclass(frozen=True, kw_only=True)
class Line:
    """logit(accuracy under shift) = slope * logit(accuracy on ImageNet) + intercept."""

    slope: float
    intercept: float
    models: int
    """How many it was fitted from."""
    correlation: float
    """Correlation of the logits; NaN if one side does not vary."""

    def expected(self, acc_imagenet: float) -> float:
        """The accuracy under shift of an ImageNet model that is this good on ImageNet."""
        return sigmoid(self.slope * logit(acc_imagenet) + self.intercept)


def fit_line(reference: Sequence[tuple[float, float]]) -> Line:
    """Least squares in logit space through (accuracy on ImageNet, accuracy under shift) of ImageNet models.

    Raises UsageError for accuracies outside of 0..1 or at its ends, where there is no logit, and for fewer than two
    models that differ on ImageNet.
    """
    for pair in reference:
        if not all(0 < accuracy < 1 for accuracy in pair):
            raise UsageError(f"accuracies {pair} have no logit; shares between 0 and 1, without the ends, are needed")
    x, y = ([logit(pair[i]) for pair in reference] for i in range(2))
    if len(set(x)) < 2:
        raise UsageError(f"{len(set(x))} different models give no line; at least two accuracies on ImageNet are needed")
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    xx = math.fsum((a - mean_x) ** 2 for a in x)
    yy = math.fsum((b - mean_y) ** 2 for b in y)
    xy = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = xy / xx
    correlation = xy / math.sqrt(xx * yy) if yy else math.nan
    return Line(slope=slope, intercept=mean_y - slope * mean_x, models=len(x), correlation=correlation)


def effective_robustness(line: Line, acc_imagenet: float, acc_shift: float) -> float:
    """How much better a model is under the shift than its accuracy on ImageNet lets expect."""
    return acc_shift - line.expected(acc_imagenet)


def relative_robustness(before: float, after: float) -> float:
    """Change of the accuracy under the shift by an intervention."""
    return after - before


def logit(share: float) -> float:
    """Log odds; infinite at 0 and 1."""
    if not 0 <= share <= 1:
        raise UsageError(f"{share} is no accuracy; a share from 0 to 1 is needed")
    if share in (0, 1):
        return math.inf if share else -math.inf
    return math.log(share) - math.log1p(-share)


def sigmoid(x: float) -> float:
    """The inverse of `logit`."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def select_classes(
    scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], classes: Sequence[int]
) -> tuple[Float[Tensor, "M K"], Int[Tensor, " M"]]:
    """ImageNet as a shift knows it: only the pictures of `classes`, scored among these, with labels in their order."""
    _check_classes(classes, scores.shape[1])
    place = torch.full((scores.shape[1],), -1, dtype=torch.int64, device=labels.device)
    place[list(classes)] = torch.arange(len(classes), device=labels.device)
    kept = place[labels] >= 0
    return scores[kept][:, list(classes)], place[labels[kept]]


def map_classes(scores: Float[Tensor, "N C"], groups: Sequence[Sequence[int]]) -> Float[Tensor, "N G"]:
    """Scores of coarser classes: of each group of classes the highest; classes in no group are not asked.

    A group without classes is never the best: a shift may have a class that ImageNet lacks.
    """
    for group in groups:
        _check_range(group, scores.shape[1])
    if not any(groups):
        raise UsageError(f"none of {len(groups)} groups has a class; name at least one")
    lowest = scores.amin(dim=1) - 1
    return torch.stack([scores[:, list(group)].amax(dim=1) if group else lowest for group in groups], dim=1)


def _check_range(classes: Sequence[int], count: int) -> None:
    if wrong := [one for one in classes if not 0 <= one < count]:
        raise UsageError(f"class {wrong[0]} is not among the {count} that were scored; use 0 to {count - 1}")


def _check_classes(classes: Sequence[int], count: int) -> None:
    _check_range(classes, count)
    if len(set(classes)) < len(classes):
        twice = next(one for one in classes if list(classes).count(one) > 1)
        raise UsageError(f"class {twice} is named twice; a class belongs to one place only")
    if not classes:
        raise UsageError("no class was named; name at least one")


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """An ImageNet model in the table of the user."""

    model: str
    accuracies: Mapping[str, float]
    """By column, 0..1; without the cells that are empty."""

    def pair(self, shift: str) -> tuple[float, float] | None:
        """(accuracy on ImageNet, accuracy under shift), on the classes of the shift if the table has that column."""
        on_imagenet = self.accuracies.get(f"{IMAGENET}@{shift}", self.accuracies.get(IMAGENET))
        under_shift = self.accuracies.get(shift)
        return None if on_imagenet is None or under_shift is None else (on_imagenet, under_shift)


def read_table(path: Path) -> tuple[TableRow, ...]:
    """Read the table of ImageNet models; numbers above 1 anywhere mean that all are percent."""
    if not path.is_file():
        raise NotFoundError(f"no such table: {path} (a CSV with the columns model, imagenet and shifts)")
    with io.StringIO(files.read_text(path, files.MAX_TABLE), newline="") as lines:
        reader = csv.DictReader(lines)
        columns = [name.strip() for name in reader.fieldnames or ()]
        if "model" not in columns or IMAGENET not in columns:
            raise UsageError(f"{path} has the columns {columns}; it needs model, imagenet and at least one shift")
        reader.fieldnames = columns
        rows = [(row["model"], _read_numbers(path, row)) for row in reader]
    percent = any(number > 1 for _, numbers in rows for number in numbers.values())
    scale = 100 if percent else 1
    return tuple(
        TableRow(model=model, accuracies={name: number / scale for name, number in numbers.items()})
        for model, numbers in rows
    )


def _read_numbers(path: Path, row: Mapping[str | None, str | None]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, cell in row.items():
        if name is None:
            raise UsageError(f"{path}: the row of {row['model']} has more cells than there are columns")
        if name == "model" or cell is None or not cell.strip():
            continue
        try:
            numbers[name] = float(cell)
        except ValueError:
            raise UsageError(f"{path}: {name} of {row['model']} is {cell!r}; a number or nothing is needed") from None
        if not 0 <= numbers[name] <= 100:
            raise UsageError(
                f"{path}: {name} of {row['model']} is {cell}; shares (0..1) or percent (0..100) are needed"
            )
    return numbers


def fit_shift(table: Sequence[TableRow], shift: str) -> Line | None:
    """The line of one shift; None if the table has fewer than two usable models. Rows at 0 or 1 are left out."""
    pairs = [pair for row in table if (pair := row.pair(shift)) and all(0 < accuracy < 1 for accuracy in pair)]
    return fit_line(pairs) if len({on_imagenet for on_imagenet, _ in pairs}) > 1 else None
