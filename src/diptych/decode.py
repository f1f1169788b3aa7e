"""Encoded bytes -> an image of Pillow's, within bounds, or the counted reason why there is none.

Every image comes through here, but for JPEGs that `diptych.image` lets libjpeg-turbo decode at a reduced scale. It
imports no torch, so that the processes of curation, which decode what strangers sent, start quickly.
"""

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from diptych.errors import PictureError, install
from diptych.image_file import MAX_BYTES, SUFFIXES, is_heic
from diptych.machine import open_file

REASONS = (
    *("missing", "unreadable", "not_a_file", "too_many_bytes", "empty"),
    *("not_a_picture", "truncated", "too_many_pixels", "too_small", "out_of_memory"),
    *("changed", "deleted"),
)
"""Why a picture is not used.

missing: no such file. unreadable: no permission, or the disk or network fails. not_a_file: a folder, pipe or device.
too_many_bytes: more than MAX_BYTES. empty: 0 bytes. not_a_picture: no format that is read. truncated: it breaks off or
is damaged inside. too_many_pixels: more than MAX_PIXELS, or a JPEG that goes over them too often. too_small: a side of
zero after resizing. out_of_memory: there was not enough. changed: not the bytes that the shard's index was made of.
deleted: taken out of its dataset."""

FORMATS = (*SUFFIXES, "MPO")
"""What is decoded, as Pillow names it (MPO: a JPEG with more pictures behind it); no other parser sees the bytes.
Pillow would start another program for some."""

ODDITIES = {
    "turned": "an EXIF orientation that is not applied, so what was upright lies on its side",
    "16-bit": "16 bits of grey, which are clipped to 8: an ordinary photograph comes out white",
    "transparent": "transparency, which is dropped, not blended with a background",
}
"""What a model is shown otherwise than people see it."""

MAX_PIXELS = 100_000_000
"""Larger pictures are refused from their header alone (decompression bombs)."""

USUAL_SCANS = 32
"""A JPEG of more scans, each of which is a pass over all pixels, is refused where scans times pixels are too many."""
_SCAN = b"\xff\xda"
_COMPRESSION, _JPEG_IN_TIFF = 259, (6, 7)
_PLACES_IN_TIFF = ((324, 325), (273, 279))
"""Tags of a TIFF: where its tiles or strips begin, and their bytes."""

# Pillow warns of odd metadata and of bombs; both are decided here. Once for all: other threads have their own filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # comments of megabytes do not damage a picture


def read_file(path: Path) -> bytes:
    """The bytes of an image's file; raises PictureError for what is no file, has no end or cannot be read."""
    try:
        # without O_NONBLOCK, opening a pipe waits for whoever writes into it
        with open(open_file(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PictureError("not_a_file", f"{path} is a folder, pipe or device")
            if status.st_size > MAX_BYTES:
                raise PictureError("too_many_bytes", f"{path} has {status.st_size:,} bytes, at most {MAX_BYTES:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise PictureError("missing", f"no such picture: {path}") from None
    except IsADirectoryError:
        raise PictureError("not_a_file", f"{path} is a folder") from None
    except (OSError, ValueError) as error:  # a NUL in a name that a table gave
        raise PictureError("unreadable", f"{path}: {getattr(error, 'strerror', None) or error}") from None


def decode(
    data: bytes, *, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS, side: int | None = None
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


def open_header(data: bytes, *, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read format and size; nothing is decoded yet. `formats`: the only parsers that see the bytes."""
    with _faults_named(data):
        return _open(data, formats, max_pixels)


def _open(data: bytes, formats: Sequence[str], max_pixels: int) -> Image.Image:
    if not data:
        raise PictureError("empty", "0 bytes")
    _register_formats()
    known = [name for name in formats if name in Image.OPEN]  # AVIF may be left out of a build
    image = Image.open(io.BytesIO(data), formats=known)
    check_pixels(image.width, image.height, data, max_pixels, _count_scans_of_tiff(image, data))
    return image


def _count_scans_of_tiff(image: Image.Image, data: bytes) -> int:
    """Passes over all pixels of a TIFF whose strips or tiles are JPEGs. Tiles are of one size, so it is the mean of
    theirs; all that there are for each, where they overlap or their places are not told."""
    if image.format != "TIFF" or (tags := image.tag_v2).get(_COMPRESSION) not in _JPEG_IN_TIFF:  # type: ignore[attr-defined]
        return 1
    starts, sizes = next(((tags[a], tags[b]) for a, b in _PLACES_IN_TIFF if a in tags and b in tags), ((), ()))
    if not sizes or not all(sizes) or sum(sizes) > len(data) or len(starts) != len(sizes):
        return data.count(_SCAN)
    scans = sum(data.count(_SCAN, start, start + size) for start, size in zip(starts, sizes, strict=True))
    return math.ceil(scans / len(sizes))


@cache
def _register_formats() -> None:
    Image.init()  # without it Pillow knows only its five most common formats
    if "HEIF" in SUFFIXES:
        with contextlib.suppress(ImportError):  # as AVIF, it may be left out of a build
            import pillow_heif  # pyright: ignore[reportMissingImports]

            pillow_heif.register_heif_opener()


def read_orientation(image: Image.Image) -> int:
    """How a picture is to be turned, as EXIF numbers it; 1: not at all. Nothing is decoded for it."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns a TIFF itself, and would look behind the pixels of a PNG
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata of any kind of damage, which the pixels have nothing to do with
        return 1


def find_oddities(data: bytes) -> tuple[str, ...]:
    """What about a picture is treated otherwise than its owner may think: keys of ODDITIES. Only its header is read."""
    if data.startswith(b"\xff\xd8\xff") and b"Exif\0\0" not in data[:4096]:
        return ()
    try:
        with _faults_named(data):
            image = _open(data, FORMATS, MAX_PIXELS)
            found = {
                "turned": read_orientation(image) != 1,
                "16-bit": image.mode.startswith("I"),
                "transparent": image.has_transparency_data,  # which fails on a palette that is not there
            }
    except PictureError:
        return ()
    return tuple(name for name, is_there in found.items() if is_there)


def check_pixels(width: int, height: int, data: bytes, max_pixels: int = MAX_PIXELS, scans: int = 1) -> None:
    """Raise PictureError for a size above the limit, or for a JPEG that goes over its pixels far too often: some 100 kB
    of scans would otherwise keep a processor for minutes."""
    scans = data.count(_SCAN) if data.startswith(b"\xff\xd8") else scans
    if width * height * (scans if scans > USUAL_SCANS else 1) > max_pixels:
        times = f" in {scans:,} scans" if scans > USUAL_SCANS else ""
        raise PictureError("too_many_pixels", f"{width} x {height}{times}, at most {max_pixels:,}")


@contextlib.contextmanager
def _faults_named(data: bytes) -> Iterator[None]:
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError("not_a_picture", _describe(data)) from None
    except Image.DecompressionBombError as error:
        raise PictureError("too_many_pixels", str(error)) from None
    except MemoryError:
        raise PictureError("out_of_memory", "there is not enough memory to decode it") from None
    except Exception as error:  # Pillow's plugins raise whatever their format made them stumble over
        raise PictureError("truncated", f"{type(error).__name__}: {error}") from None


def _describe(data: bytes) -> str:
    if is_heic(data) and "HEIF" not in SUFFIXES:
        return f"HEIC is not read without the extra `heic` ({install('heic')}); or convert it to JPEG"
    if data.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    return f"{len(data)} bytes of no format that is read ({', '.join(SUFFIXES)})"
