"""Encoded bytes -> an image of Pillow's, within bounds, or the counted reason why there is none.

It imports no torch, so that the processes of curation, which decode what strangers sent, start quickly.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence

from PIL import Image, UnidentifiedImageError

from diptych.errors import PictureError

REASONS = ("empty", "not_a_picture", "truncated", "too_many_pixels", "too_small", "changed", "deleted")
"""Why a picture is not used: no bytes, no known format, breaks off or is damaged inside, more pixels than allowed, a
side of zero after resizing, not the bytes that the shard's index was made of, deleted from its dataset."""

MAX_PIXELS = 100_000_000
"""Larger pictures are refused from their header alone (decompression bombs)."""


def decode(
    data: bytes, *, formats: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS, side: int | None = None
) -> Image.Image:
    """Decode a picture's first frame, completely; a JPEG at a reduced scale if both sides stay at least `side`.

    Raises PictureError with one of REASONS.
    """
    with _faults_named(data):
        image = _open(data, formats, max_pixels)
        if side is not None:
            image.draft("RGB", (side, side))
        image.load()
    return image


def open_header(data: bytes, *, formats: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read format and size; nothing is decoded yet. `formats`: the only parsers that see the bytes, else all."""
    with _faults_named(data):
        return _open(data, formats, max_pixels)


def _open(data: bytes, formats: Sequence[str] | None, max_pixels: int) -> Image.Image:
    if not data:
        raise PictureError("empty", "0 bytes")
    if formats is not None:
        Image.init()  # without it Pillow knows only its five most common formats
        formats = [name for name in formats if name in Image.OPEN]  # AVIF may be left out of a build
    image = Image.open(io.BytesIO(data), formats=formats)
    check_pixels(image.width, image.height, max_pixels)
    return image


def check_pixels(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise PictureError for a size above the limit."""
    if width * height > max_pixels:
        raise PictureError("too_many_pixels", f"{width} x {height}, at most {max_pixels:,}")


@contextlib.contextmanager
def _faults_named(data: bytes) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of bombs; both are decided here
            yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError("not_a_picture", f"{len(data)} bytes of no known format") from None
    except Image.DecompressionBombError as error:
        raise PictureError("too_many_pixels", str(error)) from None
    except Exception as error:  # Pillow's plugins raise whatever their format made them stumble over
        raise PictureError("truncated", f"{type(error).__name__}: {error}") from None
