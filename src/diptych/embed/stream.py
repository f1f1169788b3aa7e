"""Any number of inputs to features, in order: read in threads, computed in others, a bounded number ahead.

A batch holds up to so many *usable* inputs of one group, in order, and every input has one outcome. So what an input
is computed together with depends on the inputs alone, not on how quick the threads are.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych.errors import PictureError
from diptych.image import Picture
from diptych.machine import count_cores
from diptych.prefetch import map_ahead

Batch = TypeVar("Batch")
Key = TypeVar("Key")
Result = TypeVar("Result")
Entry = tuple[Key, Any]
"""An input's key, and what was read of it or the PictureError that says why nothing was."""

MOST_UNUSABLE = 4096
"""Unusable items that wait for a batch of usable ones to be full."""


@runtime_checkable
class Encoder(Protocol):
    """Inputs to features. Called from several threads."""

    @property
    def streams(self) -> int:
        """Batches that are best computed at the same time."""
        ...

    def read(self, content: Any, /) -> Any:
        """One input as `encode` takes it; PictureError for what cannot be used."""
        ...

    def encode(self, batch: list[Any], /) -> Float[Tensor, "N E"]:
        """Features of what `read` made: float32, on the CPU."""
        ...


@runtime_checkable
class Tower(Protocol):
    """Images to features; `diptych.embed.images.ImageTower` is one, any model can be."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def precision(self) -> str:
        """Precision that it computes in."""
        ...

    @property
    def embed_dim(self) -> int:
        """Numbers of a feature."""
        ...

    @property
    def streams(self) -> int:
        """Batches that are best computed at the same time."""
        ...

    def read(self, picture: Picture) -> np.ndarray:
        """Decode and preprocess; PictureError for what is no usable picture."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """A batch of what `read` made -> features, float32 on the CPU."""
        ...


class ImageEncoder:
    """A tower as an `Encoder`: its batches are stacked arrays. `read` takes the place of the tower's."""

    def __init__(self, tower: Tower, read: Callable[[Picture], np.ndarray] | None = None) -> None:
        self.tower, self.read, self.streams = tower, read or tower.read, tower.streams

    def encode(self, batch: list[np.ndarray]) -> Float[Tensor, "N E"]:
        """Features of what `read` made."""
        return self.tower.encode(torch.stack([torch.from_numpy(one) for one in batch]))


def encode_stream(
    encoder: Encoder,
    items: Iterable[tuple[Key, Any]],
    *,
    batch_size: int,
    group: Callable[[Key], object] = lambda _: None,
    threads: int | None = None,
    together: bool = True,
) -> Generator[tuple[Key, Float[Tensor, " E"] | PictureError]]:
    """The key of each item with its feature, or with why it has none; reading goes on while others are computed.

    A batch never spans two groups of keys. It also ends after `batch_size` items if all are unusable, so that a folder
    of rubbish does not pile up, and in any case after MOST_UNUSABLE. `threads` read, by default one a core. With
    `together` up to `batch_size` items are computed by all cores together, which may change the last bits; else all are
    computed as those of a long stream are.
    """

    def read(item: tuple[Key, Any]) -> Entry[Key]:
        key, content = item
        try:
            return key, encoder.read(content)
        except PictureError as error:
            return key, error.without_frames()

    def encode(batch: list[Entry[Key]]) -> list[Entry[Key]]:
        usable = [content for _, content in batch if not isinstance(content, PictureError)]
        features = iter(encoder.encode(usable) if usable else ())
        return [(key, one if isinstance(one, PictureError) else next(features)) for key, one in batch]

    remaining = iter(items)
    head = list(islice(remaining, batch_size + 1)) if together else []
    if together and len(head) <= batch_size:
        for batch in _fill(map(read, head), batch_size, group):
            yield from encode(batch)
        return
    ahead = (encoder.streams + 2) * batch_size
    entries = map_ahead(
        read, chain(head, remaining), threads=threads or count_cores(), ahead=ahead, prepare=use_one_thread
    )
    batches = compute_ahead(encode, _fill(entries, batch_size, group), encoder.streams)
    with closing(entries), closing(batches):
        for batch in batches:
            yield from batch


def _fill(entries: Iterable[Entry[Key]], batch_size: int, group: Callable[[Key], object]) -> Iterator[list[Entry[Key]]]:
    batch: list[Entry[Key]] = []
    usable = 0
    for entry in entries:
        unusable = len(batch) - usable
        full = usable == batch_size or unusable == MOST_UNUSABLE or (not usable and unusable == batch_size)
        if batch and (full or group(entry[0]) != group(batch[0][0])):
            yield batch
            batch, usable = [], 0
        batch.append(entry)
        usable += not isinstance(entry[1], PictureError)
    if batch:
        yield batch


def compute_ahead(function: Callable[[Batch], Result], batches: Iterable[Batch], streams: int) -> Generator[Result]:
    """`function` of every batch, in order, `streams` of them at a time; one core each if there are several."""
    threads = torch.get_num_threads()
    try:
        yield from map_ahead(
            function, batches, threads=streams, ahead=streams + 1, prepare=use_one_thread if streams > 1 else None
        )
    finally:
        torch.set_num_threads(threads)  # what a thread sets for itself is also what later threads begin with


def use_one_thread() -> None:
    """Let this thread compute by itself: PyTorch's count of threads belongs to the thread that sets it."""
    torch.set_num_threads(1)


def best_streams(device: torch.device) -> int:
    """Batches that are best computed at the same time on a device."""
    return count_cores() if device.type == "cpu" else 1
