"""Pictures as they came -> pictures worth storing: decoded within limits, upright, not larger than needed.

A picture that need not change keeps its bytes. One that is too large, of a format that shards do not take, or whose
EXIF orientation turns it is decoded, turned, made smaller and stored as JPEG, without its other metadata.
"""

import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from diptych.curate.images.phash import perceptual_hashes
from diptych.decode import MAX_PIXELS, decode, open_header
from diptych.errors import PictureError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")
"""What is decoded, as Pillow names it; no other parser sees a stranger's bytes."""
KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
"""What is stored as it came."""

HASHED_SIDE = 128
"""Pixels of the shorter side of what perceptual hashes are made of."""

_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A picture to store."""

    data: bytes
    width: int
    height: int
    original_width: int
    """As it is looked at: turned as its EXIF orientation says."""
    original_height: int


def decode_small(data: bytes, side: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one of FORMATS, at a reduced scale if both sides stay at least `side`; raises PictureError."""
    return decode(data, formats=FORMATS, max_pixels=max_pixels, side=side)


def decode_to_hash(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes -> what perceptual hashes are made of; raises PictureError."""
    return to_hash(decode_small(data, 2 * HASHED_SIDE, max_pixels))


def to_hash(picture: Image.Image) -> Image.Image:
    """Grey, and small enough that hashing it in many ways is cheap."""
    grey = on_white(picture).convert("L")
    short = min(grey.size)
    if short <= HASHED_SIDE:
        return grey
    size = tuple(max(HASHED_SIDE, round(side * HASHED_SIDE / short)) for side in grey.size)
    return grey.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def hash_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """The perceptual hash of encoded bytes; raises PictureError."""
    return int(perceptual_hashes([decode_to_hash(data, max_pixels)])[0])


def prepare(
    data: bytes,
    *,
    size: int,
    quality: int,
    keep_original: bool,
    min_side: int,
    max_aspect: float,
    max_pixels: int,
) -> Prepared:
    """Make a picture ready to be stored; raises PictureError with the reason to drop it."""
    image = open_header(data, formats=FORMATS, max_pixels=max_pixels)
    turned = _orientation(image)
    width, height = image.size if turned < 5 else image.size[::-1]
    short, long = min(width, height), max(width, height)
    if short < min_side:
        raise PictureError("too_small", f"{width} x {height}, the shorter side at least {min_side}")
    if long > max_aspect * short:
        raise PictureError("aspect", f"{width} x {height}, at most {max_aspect:g} : 1")
    decoded = decode_small(data, 2 * size, max_pixels)  # completely, so that no broken picture is stored
    if keep_original:
        return Prepared(data=data, width=image.width, height=image.height, original_width=width, original_height=height)
    if short <= size and turned == 1 and image.format in KEPT_FORMATS:
        return Prepared(data=data, width=width, height=height, original_width=width, original_height=height)
    small = _shrink(on_white(ImageOps.exif_transpose(decoded)), width, height, size)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 95 else 2)
    return Prepared(
        data=buffer.getvalue(),
        width=small.width,
        height=small.height,
        original_width=width,
        original_height=height,
    )


def _shrink(image: Image.Image, width: int, height: int, size: int) -> Image.Image:
    """To a shorter side of `size`; `width` and `height` are those before decoding at a reduced scale."""
    short = min(width, height)
    if short <= size:
        return image
    target = max(size, round(width * size / short)), max(size, round(height * size / short))
    return image.resize(target, Image.Resampling.BICUBIC)


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as a page shows it."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        turned = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not make a picture unusable
        return 1
    return turned if isinstance(turned, int) and 1 <= turned <= 8 else 1
