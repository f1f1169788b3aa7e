"""The best one-to-one assignment (Hungarian method), and with it whether labels look permuted.

SciPy has the method, but it is no dependency of diptych and would come for this alone; the classes of a confusion
matrix are few enough for fifty lines of NumPy.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.evaluate.metrics.measures import wilson_interval

TIMES = 3.0
"""A better order of the labels is reported if it makes accuracy this many times as high, or surely higher."""
SURELY = 0.05
"""... by at least so much, and beyond both intervals (three standard deviations)."""
_Z = 3.0


def assign(gain: Float[np.ndarray, "C C"]) -> Int[np.ndarray, " C"]:
    """For each row its column, so that the sum of gains is largest: shortest augmenting paths, O(C^3)."""
    cost = gain.max(initial=0) - gain
    size = len(cost)
    u, v = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)  # of a column, both from 1; 0: none
    for row in range(1, size + 1):
        row_of[0], column = row, 0
        least, before = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int64)
        used = np.zeros(size + 1, dtype=bool)
        while row_of[column]:
            used[column] = True
            reduced = cost[row_of[column] - 1] - u[row_of[column]] - v[1:]
            free = ~used[1:]
            better = free & (reduced < least[1:])
            least[1:][better], before[1:][better] = reduced[better], column
            nearest = int(np.where(free, least[1:], np.inf).argmin()) + 1
            step = least[nearest]
            u[row_of[used]] += step
            v[used] -= step
            least[~used] -= step
            column = nearest
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    columns = np.empty(size, dtype=np.int64)
    columns[row_of[1:] - 1] = np.arange(size)
    return columns


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Another order of the labels."""

    before: float
    """Accuracy with the labels as they are, on the pictures that did not choose the order."""
    after: float
    """With the better order, on the same."""
    columns: tuple[int, ...]
    """For each label the class that it should be."""

    @property
    def moved(self) -> list[int]:
        return [label for label, column in enumerate(self.columns) if label != column]


def find_permutation(predicted: Int[Tensor, " N"], labels: Int[Tensor, " N"], classes: int) -> Permutation | None:
    """A clearly better order of the labels, if there is one: chosen on every second picture, measured on the others,
    so that what fits chance alone does not count."""
    order = labels.sort(stable=True).indices  # so that both halves have pictures of every class
    choose, hold = order[0::2], order[1::2]
    if classes < 2 or not len(hold):
        return None
    table = confusion(predicted[choose], labels[choose], classes).double().numpy()
    columns = torch.from_numpy(assign(table + 1e-3 * np.eye(classes)))  # of equal ones, the order that there is
    held = labels[hold]
    before = (predicted[hold] == held).double().mean().item()
    after = (predicted[hold] == columns[held]).double().mean().item()
    least, most = wilson_interval(after, len(held), _Z)[0], wilson_interval(before, len(held), _Z)[1]
    many = after >= TIMES * before and least > max(before, 1 / classes)
    if after - before < SURELY or not (least > most or many):
        return None
    return Permutation(before=before, after=after, columns=tuple(columns.tolist()))


def confusion(predicted: Int[Tensor, " N"], labels: Int[Tensor, " N"], classes: int) -> Int[Tensor, "C C"]:
    """Pictures by class and prediction."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
