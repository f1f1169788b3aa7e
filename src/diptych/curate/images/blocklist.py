"""Images that must not be kept: a list of hashes, exact or perceptual."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diptych import files
from diptych.curate.images.prepare import hash_picture
from diptych.decode import MAX_PIXELS
from diptych.errors import NotFoundError, PictureError, UsageError

_DIGITS = {32: "md5", 40: "sha1", 64: "sha256"}
Known = Callable[[bytes], str | None]
"""Bytes of a picture -> the list it is on, or None."""


@dataclass(frozen=True, kw_only=True)
class KnownHashes:
    """Pictures that must not be stored, by hashes of their bytes and by perceptual hashes; picklable."""

    digests: dict[str, frozenset[str]] = field(default_factory=dict)
    """Algorithm -> hexadecimal digests."""
    perceptual: tuple[int, ...] = ()
    max_distance: int = 4
    """Bits by which a perceptual hash may differ."""
    max_pixels: int = MAX_PIXELS

    def __bool__(self) -> bool:
        return bool(self.digests or self.perceptual)

    def __call__(self, data: bytes) -> str | None:
        """The kind of hash that is listed, or None."""
        for name, digests in self.digests.items():
            if hashlib.new(name, data, usedforsecurity=False).hexdigest() in digests:
                return name
        if not self.perceptual:
            return None
        try:
            found = hash_picture(data, self.max_pixels)
        except PictureError:
            return None  # it will be dropped as a picture that cannot be read
        listed = np.array(self.perceptual, np.uint64)
        near = np.bitwise_count(listed ^ np.uint64(found)) <= self.max_distance
        return "phash" if near.any() else None


def read_known(paths: Iterable[Path], max_distance: int, max_pixels: int = MAX_PIXELS) -> KnownHashes:
    """Read lists: a hash a line, `#` begins a comment."""
    digests: dict[str, set[str]] = {}
    perceptual: set[int] = set()
    for path in paths:
        if not path.is_file():
            raise NotFoundError(f"no such list of hashes: {path}")
        for number, line in enumerate(files.read_text(path, files.MAX_TABLE).splitlines(), 1):
            text = line.partition("#")[0].strip().lower()
            if not text:
                continue
            kind, colon, rest = text.partition(":")
            try:
                if colon and kind == "phash" and len(rest) == 16:
                    perceptual.add(int(rest, 16))
                    continue
                digests.setdefault(_DIGITS[len(bytes.fromhex(text)) * 2], set()).add(text)
            except (ValueError, KeyError):
                raise UsageError(
                    f"{path}, line {number}: {text[:80]!r} is no hash; write 32, 40 or 64 hexadecimal digits, or "
                    "phash: and 16"
                ) from None
    return KnownHashes(
        digests={name: frozenset(found) for name, found in sorted(digests.items())},
        perceptual=tuple(sorted(perceptual)),
        max_distance=max_distance,
        max_pixels=max_pixels,
    )
