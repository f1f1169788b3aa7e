"""What an image file is: the formats that are read, their suffixes, their first bytes, and where they lie in a folder.

The one table of the project: `classify`, `embed`, shards and evaluation sets take the same files for images. Curation
takes fewer (`diptych.curate.images.prepare.FORMATS`), since it decodes what strangers sent.
"""

import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from diptych.errors import UsageError

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
}
"""Format, as Pillow names it -> suffixes of its files, the usual one first."""
if find_spec("pillow_heif"):  # the extra `heic`
    SUFFIXES["HEIF"] = (".heic", ".heif")
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
"""Suffixes of files and of members of tars that are taken for images, in lower case."""

MAX_BYTES = 1 << 30
"""Bytes of an encoded image that are read; a larger one is `too_many_bytes`."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
)


def find_format(data: bytes) -> str | None:
    """The format that the first bytes of a file tell, or None for one that is not read.

    >>> find_format(b"RIFF0000WEBPVP8 ")
    'WEBP'
    """
    if data[:4] == b"RIFF":
        return "WEBP" if data[8:12] == b"WEBP" else None
    if is_heic(data):
        return "HEIF" if "HEIF" in SUFFIXES else None
    if data[4:8] == b"ftyp":
        return "AVIF" if b"avif" in data[8:64] or b"avis" in data[8:64] else None
    return next((name for signature, name in _SIGNATURES if data.startswith(signature)), None)


def is_heic(data: bytes) -> bool:
    """Whether the first bytes are those of HEIC, which phones write."""
    return data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no content: its name begins with a dot, or macOS laid it beside its own."""
    return name.startswith(".") or name == "__MACOSX"


def find_images(folder: Path) -> tuple[tuple[str, ...], Counter[str]]:
    """Paths of all images below a folder, relative to it and sorted, and how many other files there are by suffix.

    What is hidden is left alone, and links to folders are not followed.

    Raises:
        UsageError: A folder below cannot be listed. Its images would otherwise be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(
            f"{error.filename} cannot be listed ({error.strerror}); make it readable, or name the folders beside it"
        )

    names: list[str] = []
    others = Counter[str]()
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            if is_hidden(name):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                names.append(os.path.relpath(os.path.join(place, name), folder))
            else:
                others[suffix] += 1
    return tuple(sorted(names)), others
