"""Pictures of every kind that Pillow decodes differently, as encoded bytes; made of numpy's numbers alone."""

import io

import numpy as np
from PIL import Image

SIZES = [(37, 53), (53, 37), (224, 224), (224, 225), (225, 224), (320, 239), (1, 300), (300, 7), (97, 300), (20, 20)]
"""Width and height: odd, exact, off by one, extreme, with one side that fits, and smaller than any model takes."""
KINDS_AT = (75, 51)


def smooth(width: int, height: int, channels: int, seed: int = 0) -> np.ndarray:
    """Waves with some noise [H, W, C]: neither flat nor all edges."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + 2 * c) + c) * np.cos(y / (7 + c)) for c in range(channels)]
    values = 127 + 90 * np.stack(waves, axis=-1) + draw.normal(0, 3, (height, width, channels))
    return values.clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_pictures() -> dict[str, bytes]:
    """Name -> encoded picture."""
    pictures = {f"rgb {w}x{h}": encode(Image.fromarray(smooth(w, h, 3))) for w, h in SIZES}
    width, height = KINDS_AT
    rgb, rgba = Image.fromarray(smooth(width, height, 3)), Image.fromarray(smooth(width, height, 4))
    grey = smooth(width, height, 1)[..., 0]
    palette = rgb.quantize(64)
    pictures |= {
        "rgba": encode(rgba),
        "palette": encode(palette),
        "palette with a transparent colour": encode(palette, transparency=3),
        "palette with transparency by entry": encode(palette, transparency=bytes(range(64))),
        "grey": encode(Image.fromarray(grey)),
        "grey with alpha": encode(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey[::-1].copy())])),
        "black and white": encode(Image.fromarray(grey).convert("1")),
        "16-bit grey": encode(Image.fromarray(grey.astype(np.uint16) * 257)),
        "16-bit grey of low values": encode(Image.fromarray(grey.astype(np.uint16))),
        "32-bit grey": encode(Image.fromarray(grey.astype(np.int32) * 3), "TIFF"),
        "float grey": encode(Image.fromarray(grey.astype(np.float32) * 1.5 - 20), "TIFF"),
        "CMYK TIFF": encode(rgb.convert("CMYK"), "TIFF"),
        "CMYK JPEG": encode(rgb.convert("CMYK"), "JPEG", quality=90),
        "JPEG": encode(rgb, "JPEG", quality=90),
        "JPEG 4:4:4": encode(rgb, "JPEG", quality=90, subsampling=0),
        "progressive JPEG": encode(rgb, "JPEG", quality=75, progressive=True),
        "grey JPEG": encode(Image.fromarray(grey), "JPEG", quality=90),
        "YCbCr TIFF": encode(rgb.convert("YCbCr"), "TIFF"),
        "LAB TIFF": encode(rgb.convert("LAB"), "TIFF"),
        "animated GIF": encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90).resize(rgb.size)]),
        "WebP": encode(rgba, "WEBP", lossless=True),
        "BMP": encode(rgb, "BMP"),
    }
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    pictures["JPEG turned by EXIF"] = encode(rgb, "JPEG", quality=90, exif=exif)
    return pictures
