"""From images to pixels: resize, crop, normalise.

Two paths, one meaning. `Preprocess` is what a model sees when it is used: exactly OpenAI's (Pillow bicubic, centre
crop), or for many pictures nearly that, in a third of the time (`quick_pixels`). `read_crop` is what it sees while it
is trained: a random square crop of the resized picture (paper section 2.3), read from a JPEG that is decoded at a
reduced scale where that loses next to nothing.

Every picture is bounded before it is decoded (`decode`); what cannot be used raises PictureError with a counted reason.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from diptych.config import LATER
from diptych.decode import check_pixels, decode, find_oddities, read_file, read_orientation
from diptych.errors import PictureError, UsageError, unknown_name

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

SCALED_DECODE_MARGIN = 1.75
"""A JPEG is decoded at a reduced scale (7/8 to 1/8) only if what comes out is still this many times larger than what
is needed."""

MAX_ASPECT = 64
"""Pictures with longer sides than this many times the shorter one are cropped before they are resized."""

_JPEG = b"\xff\xd8\xff"

QUICK_MARGIN = 4.0
"""The same for `Preprocess.quick_pixels`, which takes halves only (1/2, 1/4, 1/8): with less, or at 3/8 or 5/8, some
features are further from the exact ones than a cosine of 0.999 (docs/embed.md)."""

Picture = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""What a user may hand over: a path, encoded bytes, a Pillow picture, an array [H, W, 3]."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Pillow picture -> normalised pixels [3, image_size, image_size].

    Resize the shorter side (bicubic, antialiased), crop the centre, convert to RGB, scale to 0..1, subtract the mean,
    divide by the deviation: the order of operations, and so every bit, is openai/CLIP's. Some later models were
    trained on pictures squashed to a square, or with a bilinear filter; the checkpoint says so.

    What each kind of picture gets (docs/checkpoints.md has the whole table): transparency is dropped, not blended;
    16-bit grey is clipped to 8 bits, as Pillow does it; an EXIF orientation is not applied unless `turn` says so.
    """

    image_size: int
    """Side of the square that the model takes, pixels."""
    mean: tuple[float, float, float] = OPENAI_MEAN
    """Per channel, of values 0..1."""
    std: tuple[float, float, float] = OPENAI_STD
    """Per channel, of values 0..1."""
    resize: Literal["shorter_side", "squash"] = "shorter_side"
    """`shorter_side`: to image_size, then the centre is cropped. `squash`: both sides, whatever the proportions."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """The filter, antialiased in both cases."""
    turn: bool = field(default=False, metadata=LATER)
    """Turn a picture as its EXIF orientation says, first of all. OpenAI's preprocessing does not."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UsageError(f"image_size {self.image_size} is no picture; use at least 1")
        for name, allowed in (("resize", ("shorter_side", "squash")), ("interpolation", ("bicubic", "bilinear"))):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, str(getattr(self, name)), allowed)
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or 0 in self.std:
            raise UsageError(f"mean {self.mean} and std {self.std} must be finite, and no deviation 0")

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        return self.normalize(torch.from_numpy(self.pixels(image)).unsqueeze(0))[0]

    def pixels(self, image: Image.Image) -> UInt8[np.ndarray, "3 H W"]:
        """The part before normalisation: what is cheap to keep and to send."""
        size, resample = self.image_size, Image.Resampling[self.interpolation.upper()]
        if min(image.size) < 1:
            raise PictureError("too_small", f"{image.width} x {image.height}")
        if self.turn and read_orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if self.resize == "squash":
            image = image if image.size == (size, size) else image.resize((size, size), resample)
        elif is_stripe(*image.size):
            image = _resize_centre(image, size, resample)
        else:
            image = resize_shorter_side(image, size, resample)
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            image = image.crop((left, top, left + size, top + size))
        return np.ascontiguousarray(np.asarray(to_rgb(image)).transpose(2, 0, 1))

    def quick_pixels(self, picture: Picture) -> UInt8[np.ndarray, "3 H W"]:
        """`pixels` of a picture, nearly: a third of the time for a photo of 500 px, less for larger ones.

        Resized by PyTorch's kernel for bytes, which differs from Pillow's by one level of 255 in a few values of a
        thousand; a JPEG is decoded at a reduced scale where QUICK_MARGIN allows it. What is no plain RGB
        (palettes, transparency, CMYK) is left to `pixels`.
        """
        data = read_file(Path(picture)) if isinstance(picture, str | Path) else picture
        if self.turn and isinstance(data, bytes) and "turned" in find_oddities(data):
            return self.pixels(open_picture(data))
        decoded = _decode_scaled(data, self.image_size, halves=True) if isinstance(data, bytes) else None
        if decoded is None:
            image = open_picture(data)
            if image.mode != "RGB" or is_stripe(*image.size) or (self.turn and read_orientation(image) != 1):
                return self.pixels(image)
            decoded = np.array(image), image.size
        elif is_stripe(*decoded[1]):
            return self.pixels(open_picture(data))
        return _resize_bytes(*decoded, self)

    def normalize(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        """Bytes 0..255 -> normalised float32, on the device where the bytes are."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return pixels.float().div_(255).sub_(mean).div_(std)


def open_picture(picture: Picture) -> Image.Image:
    """Open whatever the user has; decoded completely, so that a damaged file fails here.

    Raises PictureError for a path that is not there, or what is no usable picture, and UsageError for other types.
    """
    match picture:
        case Image.Image():
            return picture
        case np.ndarray():
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise UsageError(
                    f"an array of {picture.dtype} {list(picture.shape)} is not a picture; use uint8 [H, W, 3]"
                )
            if not picture.size:
                raise PictureError("too_small", f"an array of {list(picture.shape)}")
            return Image.fromarray(picture)
        case bytes():
            return decode(picture)
        case str() | Path():
            try:
                return decode(read_file(Path(picture)))
            except PictureError as error:
                raise error.of(str(picture)) from None
        case _:
            raise UsageError(
                f"{type(picture).__name__} is not a picture; give a path, encoded bytes, a Pillow image, or an array "
                "of uint8 [H, W, 3]"
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB as Pillow does it: transparency is dropped, not blended."""
    if image.mode == "RGB":
        return image
    if isinstance(image.info.get("transparency"), bytes):  # one alpha for each colour: Pillow drops it with a warning
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def resize_shorter_side(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize so that the shorter side is `size`; the longer side is truncated as torchvision does."""
    new = _shorter_side(*image.size, size)
    return image if min(image.size) == size else image.resize(new, resample)


def is_stripe(width: int, height: int) -> bool:
    """Whether a picture is so narrow that resizing all of it, to keep its centre, would take gigabytes."""
    return max(width, height) > MAX_ASPECT * max(min(width, height), 1)


def _resize_centre(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """The centre of `resize_shorter_side(image, size)`: the filter sees what it reaches of the rest, and no more."""
    new = _shorter_side(*image.size, size)
    box, kept = [0, 0, *new], [0, 0, size, size]
    long = 0 if image.width > image.height else 1
    scale = image.size[long] / new[long]  # of the original, pixels for each that is made
    reach = math.ceil(2 * max(scale, 1) / scale) + 1  # of a bicubic filter, pixels that are made
    start = round((new[long] - size) / 2)
    box[long], box[long + 2] = max(0, start - reach), min(new[long], start + size + reach)
    kept[long], kept[long + 2] = start - box[long], start - box[long] + size
    whole = [image.size[i % 2] / new[i % 2] * box[i] for i in range(4)]
    made = image.resize((box[2] - box[0], box[3] - box[1]), resample, box=(whole[0], whole[1], whole[2], whole[3]))
    return made.crop((kept[0], kept[1], kept[2], kept[3]))


def _shorter_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height once the shorter one is `size`."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _resize_bytes(
    image: UInt8[np.ndarray, "h w 3"], full: tuple[int, int], how: Preprocess
) -> UInt8[np.ndarray, "3 S S"]:
    """`Preprocess.pixels` by PyTorch's kernel for bytes. `full` is the size that the picture has at full scale: all
    geometry is that picture's, whatever its decoded width and height were rounded to."""
    size = how.image_size
    new = (size, size) if how.resize == "squash" else _shorter_side(*full, size)
    pixels = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    times = round(full[0] / image.shape[1])
    if times > 1 and (full[0] % times or full[1] % times):  # the last column or row stands for less than it holds
        scale = [(target + 1e-6) * times / side for target, side in zip(new[::-1], full[::-1], strict=True)]
        pixels = F.interpolate(pixels, scale_factor=scale, mode=how.interpolation, antialias=True)
    elif new != full:
        pixels = F.interpolate(pixels, size=new[::-1], mode=how.interpolation, antialias=True)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return pixels[0, :, top : top + size, left : left + size].contiguous().numpy()


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Which square of a picture to take, in fractions, so that it does not depend on the picture's size."""

    side: float = 1.0
    """Crop's share of the shorter side, in (0, 1]."""
    left: float = 0.5
    """0 touches the left edge, 1 the right."""
    top: float = 0.5
    """0 touches the upper edge, 1 the lower."""

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, upper, right and lower edge in pixels of a picture of this size."""
        side = self.side * min(width, height)
        left, top = self.left * (width - side), self.top * (height - side)
        return left, top, left + side, top + side


def read_crop(data: bytes, crop: Crop, size: int) -> UInt8[np.ndarray, "3 H W"]:
    """Encoded picture -> bytes [3, size, size] of one square of it, resized bicubic with antialiasing.

    Resizing the square alone equals resizing the picture and cropping, up to the filter's reach at the square's edge.
    """
    decoded = _decode_scaled(data, round(size / crop.side))
    image = decode(data) if decoded is None else Image.fromarray(decoded[0])
    if min(image.size) < 1:
        raise PictureError("too_small", f"{image.width} x {image.height}")
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=crop.box(*image.size))
    return np.ascontiguousarray(np.asarray(to_rgb(image)).transpose(2, 0, 1))  # resized first, as `Preprocess` does it


def _decode_scaled(
    data: bytes, size: int, *, halves: bool = False
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]] | None:
    """A JPEG's pixels, larger than `size` by the margin or more, and its width and height at full scale.

    None for what Pillow has to decide: other formats, CMYK, what libjpeg-turbo refuses.
    """
    if not data.startswith(_JPEG):
        return None
    try:
        header = simplejpeg.decode_jpeg_header(data)
        height, width, colorspace = int(header[0]), int(header[1]), header[2]
        check_pixels(width, height, data)
        if colorspace in ("CMYK", "YCCK"):
            return None  # Pillow inverts Adobe's CMYK as it should
        least = [round(size * SCALED_DECODE_MARGIN)] * 2
        if halves:
            times = next((n for n in (8, 4, 2) if min(height, width) >= n * size * QUICK_MARGIN), 1)
            least = [-(-side // times) for side in (height, width)]  # rounded as libjpeg does
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], strict=True)
    except PictureError:
        raise
    except ValueError:
        return None  # damaged, or a variant that libjpeg-turbo does not know
    return pixels, (width, height)
