"""Pictures: every format x mode x shape x damage, headers that lie, bombs, other formats under a picture's name."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, features

from samples import write_tar
from strangers.case import MIB, Case, Outcome, World, accounted, damage_bytes, went_on
from strangers.world import FINETUNE, JPEG, copy

KIND = "pictures"
MODES = {
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "PA"),
    "BMP": ("RGB", "RGBA", "L", "1", "P"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "CMYK", "LAB", "F", "I", "I;16", "1", "P"),
    "AVIF": ("RGB", "RGBA", "L"),
    "JPEG2000": ("RGB", "RGBA", "L", "LA", "I;16"),
}
SUFFIX = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}
CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
SHAPES = [(1, 1), (1, 300), (300, 1), (3, 200), (32, 32), (33, 31), (130, 65)]
COMMANDS = ("embed", "classify", "evaluate", "finetune")


@cache
def noise(size: tuple[int, int], mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    match mode:
        case "RGBA" | "LA":
            return image.convert(mode)
        case "I;16":
            return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        case "LAB":
            return Image.merge("LAB", image.convert("RGB").split())
        case "PA":  # a palette, one of whose colours is transparent
            image = image.convert("RGB").quantize(16)
            image.info["transparency"] = 3
            return image
    return image.convert("RGB").convert(mode)


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0, pixels: bytes | None = None) -> bytes:
    """A PNG made by hand; `chunks` come before the pixels."""
    row = (width * depth * (1, 0, 3, 1, 2, 0, 4)[colour] + 7) // 8 + 1
    body = zlib.compress(bytes(row * height), 9) if pixels is None else pixels
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", body) + chunk(b"IEND")


# --- every format ----------------------------------------------------------------------------------------------------


def of_format(name: str, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Whole pictures of every mode and shape, then damaged ones."""
    draws = random.Random(f"{name} {seed}")
    whole = {}
    for mode in MODES[name]:
        for size in SHAPES:
            whole[f"{mode.replace(';', '')}-{size[0]}x{size[1]}"] = encode(noise(size, mode), name)
    yield from whole.items()
    for number in range(count):
        label, data = draws.choice(list(whole.items()))
        yield f"{label}-{number}", damage_bytes(data, draws)


# --- made to harm ----------------------------------------------------------------------------------------------------


def _jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encode(noise((16, 16), "L"), "JPEG"))
    where = data.index(b"\xff\xc0") + 5
    data[where : where + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(side: int = 3000, scans: int = 2000) -> bytes:
    """A progressive JPEG whose last scan comes again and again: a pass over all pixels each."""
    data = encode(Image.new("L", (side, side), 90), "JPEG", progressive=True, quality=30)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def tiff(*tags: tuple[int, int, int, int], next_ifd: int = 0, tail: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_ifd) + tail


def tiff_of_jpegs(jpeg: bytes, side: int = 3000, strips: int = 1) -> bytes:
    """A TIFF of strips that are all the same JPEG."""
    first = 8 + 2 + 9 * 12 + 4
    place = [(273, 4, 1, first), (279, 4, 1, len(jpeg))]
    if strips > 1:
        place = [(273, 4, strips, first), (279, 4, strips, first + 4 * strips)]
        jpeg = struct.pack(f"<{2 * strips}I", *[first + 8 * strips] * strips, *[len(jpeg)] * strips) + jpeg
    size = [(256, 3, 1, side), (257, 3, 1, side * strips), (278, 4, 1, side)]
    kind = [(258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff(*sorted([*size, *kind, *place]), tail=jpeg)


def _animated(name: str, frames: int, size: tuple[int, int]) -> bytes:
    first, *rest = [Image.new("P" if name == "GIF" else "RGB", size, i % 250) for i in range(frames)]
    return encode(first, name, save_all=True, append_images=rest)


def _with_xmp(xmp: bytes) -> bytes:
    return (
        JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 31) + b"http://ns.adobe.com/xap/1.0/\0" + xmp + JPEG[2:]
    )


def _after(marker: bytes, data: bytes, extra: bytes) -> bytes:
    where = data.index(marker) - 4
    return data[:where] + extra + data[where:]


_PNG = encode(noise((40, 30), "RGB"), "PNG")
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n"
HOSTILE: dict[str, Callable[[], bytes]] = {
    "png 60000x60000": lambda: png(60_000, 60_000, pixels=b"x"),
    "png 2^31 wide": lambda: png(2**31 - 1, 1, pixels=b"x"),
    "png 0 wide": lambda: png(0, 5, pixels=b"x"),
    "png 99999999x1": lambda: png(99_999_999, 1),
    "png 1x99999999": lambda: png(1, 40_000_000),
    "png 9999x9999": lambda: png(9_999, 9_999),
    "png 9999x9999 of 16 bits": lambda: png(
        9_999, 9_999, depth=16, colour=6, pixels=zlib.compress(bytes(80_000 * 4000))
    ),
    "png 9999x9999 of one bit": lambda: png(9_999, 9_999, depth=1),
    "png profile of 1 GB": lambda: png(9, 9, chunk(b"iCCP", b"a\0\0" + _deflated(1 << 30))),
    "png text of 1 GB": lambda: png(9, 9, chunk(b"zTXt", b"a\0\0" + _deflated(1 << 30))),
    "png international text of 1 GB": lambda: png(9, 9, chunk(b"iTXt", b"a\0\1\0\0\0" + _deflated(1 << 30))),
    "png 100000 chunks": lambda: png(9, 9, chunk(b"tEXt", b"a\0b") * 100_000),
    "png animation of 10^9 frames": lambda: png(9, 9, chunk(b"acTL", struct.pack(">II", 10**9, 0))),
    "png chunk of 4 GB": lambda: _PNG[:33] + b"\xff\xff\xff\xff" + _PNG[37:],
    "png second header": lambda: _after(b"IDAT", _PNG, chunk(b"IHDR")),
    "png colour space behind the pixels": lambda: _after(b"IEND", _PNG, chunk(b"sRGB")),
    "png of no palette": lambda: png(9, 9, colour=3),
    "png of an impossible depth": lambda: png(9, 9, depth=3),
    "png of an unknown colour": lambda: png(9, 9, colour=5),
    "jpg 65535x65535": lambda: _jpeg_of(65_535, 65_535),
    "jpg 1x65000": lambda: encode(Image.new("L", (1, 65_000)), "JPEG"),
    "jpg 65000x1": lambda: encode(Image.new("L", (65_000, 1)), "JPEG"),
    "jpg no height": lambda: _jpeg_of(9, 0),
    "jpg many scans": many_scans,
    "jpg comments without end": lambda: JPEG[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 300 + JPEG[2:],
    "jpg filled up": lambda: JPEG[:2] + b"\xff" * 5_000_000 + JPEG[2:],
    "jpg broken xmp": lambda: _with_xmp(b'<x tiff:Orientation="\xa8"/>'),
    "jpg xmp entities": lambda: _with_xmp(b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>'),
    "jpg broken exif": lambda: JPEG[:2] + b"\xff\xe1\0\x20Exif\0\0" + b"\xff" * 24 + JPEG[2:],
    "jpg exif in a circle": lambda: _exif(struct.pack("<HHII", 0x8769, 4, 1, 8)),
    "jpg turned by no number": lambda: _exif(struct.pack("<HHII", 0x0112, 2, 1 << 30, 9)),
    "gif 65535x65535": lambda: (
        b"GIF89a" + b"\xff\xff\xff\xff\xf7\0\0" + bytes(768) + b",\0\0\0\0\xff\xff\xff\xff\0\x08"
    ),
    "gif 300 frames": lambda: _animated("GIF", 300, (300, 300)),
    "gif frame outside": lambda: (
        b"GIF89a\x09\0\x09\0\x80\0\0" + bytes(6) + b",\xf0\xff\xf0\xff\x09\0\x09\0\0\x02\x02D\x01\0;"
    ),
    "gif comments without end": lambda: (
        b"GIF89a\x09\0\x09\0\x80\0\0" + bytes(6) + b"!\xfe" + (b"\xff" + b"a" * 255) * 40_000
    ),
    "webp 16383x16383": lambda: b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f\xff\xff\xff\x0f" + bytes(16),
    "webp 100 frames": lambda: _animated("WEBP", 100, (64, 64)),
    "bmp 2^31": lambda: (
        b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + struct.pack("<iiHHI", 2**31 - 1, 2**31 - 1, 1, 24, 0) + bytes(20)
    ),
    "bmp negative": lambda: (
        b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + struct.pack("<iiHHI", -9, -9, 1, 24, 0) + bytes(60)
    ),
    "bmp run of 255": lambda: (
        b"BM"
        + bytes(8)
        + b"\x36\x04\0\0\x28\0\0\0"
        + struct.pack("<iiHHI", 9_000, 9_000, 1, 8, 1)
        + bytes(20 + 1024)
        + b"\xff\x01" * 300_000
    ),
    "tif of a jpg of many scans": lambda: tiff_of_jpegs(many_scans()),
    "tif of one jpg of many scans in many places": lambda: tiff_of_jpegs(many_scans(300, 700), 300, 200),
    "tif in a circle": lambda: tiff(
        (256, 3, 1, 9),
        (257, 3, 1, 9),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (278, 3, 1, 9),
        (279, 4, 1, 81),
        next_ifd=8,
        tail=bytes(99),
    ),
    "tif 10^9 strips": lambda: tiff(
        (256, 4, 1, 9000),
        (257, 4, 1, 9000),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 10**9, 8),
        (279, 4, 10**9, 8),
    ),
    "tif 2^32 wide": lambda: tiff(
        (256, 4, 1, 2**32 - 1),
        (257, 4, 1, 1),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (279, 4, 1, 8),
    ),
    "tif 60000 bits": lambda: tiff(
        (256, 4, 1, 9),
        (257, 4, 1, 9),
        (258, 3, 1, 60_000),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (279, 4, 1, 8),
    ),
    "tif of 65535 samples": lambda: tiff(
        (256, 4, 1, 9),
        (257, 4, 1, 9),
        (258, 3, 1, 8),
        (277, 3, 1, 65_535),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (279, 4, 1, 8),
    ),
    "jp2 2^32 wide": lambda: _jp2(2**32 - 1, 2**32 - 1),
    "jp2 of tiles of one pixel": lambda: _jp2(9_000, 9_000, tile=1),
    "jp2 of 16384 components": lambda: _jp2(9, 9, components=16_384),
    "eps": lambda: _EPS,
    "eps behind a header for DOS": lambda: (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, len(_EPS), 0, 0, 0, 0) + bytes(4) + _EPS
    ),
    "ps": lambda: b"%!PS\n(/tmp/started) (w) file closefile\n",
    "pdf": lambda: b"%PDF-1.7\n1 0 obj<</OpenAction<</S/Launch/F(/bin/sh)>>>>endobj\n",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "html": lambda: b"<!DOCTYPE html><html><script>1</script>",
    "zip": lambda: b"PK\x03\x04" + bytes(60),
    "wmf": lambda: b"\xd7\xcd\xc6\x9a" + bytes(60),
    "ico": lambda: encode(noise((32, 32), "RGBA"), "ICO"),
    "ppm": lambda: b"P6 60000 60000 255\n",
    "tga": lambda: encode(noise((32, 32), "RGB"), "TGA"),
    "pcx": lambda: encode(noise((32, 32), "RGB"), "PCX"),
    "fits": lambda: b"SIMPLE  =                    T" + bytes(2850),
    "mpo": lambda: encode(noise((60, 40), "RGB"), "MPO", save_all=True, append_images=[noise((9, 9), "RGB")]),
    "heic": lambda: b"\0\0\0\x18ftypheic" + bytes(100),
    "avif that is none": lambda: b"\0\0\0\x18ftypavif" + bytes(5_000),
    "empty": lambda: b"",
    "one byte": lambda: b"\xff",
    "zeros": lambda: bytes(100_000),
    "both jpg and zip": lambda: JPEG + b"PK\x03\x04" + bytes(999),
    "both gif and script": lambda: b"GIF89a/*" + bytes(9) + b"*/=1;alert(1)",
}


def _deflated(size: int) -> bytes:
    """Zeros that take little room."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def _exif(entry: bytes) -> bytes:
    body = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


def _jp2(width: int, height: int, *, tile: int = 0, components: int = 1) -> bytes:
    image = encode(noise((16, 16), "L"), "JPEG2000", no_jp2=True)
    tiles = (tile or width, tile or height)
    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, *tiles, 0, 0, components) + b"\x07\x01\x01" * components
    where = image.index(b"\xff\x51")
    length = struct.unpack(">H", image[where + 2 : where + 4])[0]
    stream = (
        image[:where] + b"\xff\x51" + struct.pack(">H", (len(size) + 2) & 0xFFFF) + size + image[where + 2 + length :]
    )
    header = b"ihdr" + struct.pack(">IIHBBBB", height, width, components & 0xFFFF, 7, 7, 0, 0)
    jp2h = struct.pack(">I", len(header) + 4) + header + b"\0\0\0\x0fcolr\x01\0\0\0\0\0\x11"
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    return boxes + struct.pack(">I", len(jp2h) + 8) + b"jp2h" + jp2h + b"\0\0\0\0jp2c" + stream


# --- the commands ----------------------------------------------------------------------------------------------------


def iter_cases(world: World, rounds: int = 60) -> Iterator[Case]:
    available = [name for name in MODES if name not in CODECS or features.check(CODECS[name])]
    for name in available:
        count = len(MODES[name]) * len(SHAPES) + rounds
        for seed, command in enumerate(COMMANDS):
            fill = partial(of_format, name, seed, rounds)
            yield _case(
                world, f"{name} of every mode and shape, damaged", command, fill, SUFFIX.get(name, name.lower()), count
            )
    for name, build in HOSTILE.items():
        own = name.split()[0]
        suffix = own if own in ("png", "jpg", "gif", "webp", "bmp", "tif", "jp2") else "jpg"
        yield _case(world, name, "embed", partial(_one, build), suffix, 1)
    for command in COMMANDS[1:]:
        usual = {name: build for name, build in HOSTILE.items() if "9999x9999" not in name and "GB" not in name}
        yield _case(world, "all that is made to harm", command, partial(_all, usual), "png", len(usual))


def _one(build: Callable[[], bytes]) -> Iterator[tuple[str, bytes]]:
    yield "it", build()


def _all(builds: dict[str, Callable[[], bytes]]) -> Iterator[tuple[str, bytes]]:
    for name, build in builds.items():
        yield name.replace(" ", "-").replace(".", ""), build()


def _case(
    world: World, name: str, command: str, fill: Callable[[], Iterator[tuple[str, bytes]]], suffix: str, count: int
) -> Case:
    def make(folder: Path) -> list[str]:
        members = [(f"{label}.{suffix}", data) for label, data in fill()]
        if command == "finetune":
            good = [(f"good{i}.jpg", JPEG) for i in range(8)]
            write_tar(
                folder / "a.tar",
                [m for n, d in [*members, *good] for m in ((n, d), (n.rsplit(".", 1)[0] + ".txt", b"a"))],
            )
            copy(world, folder, "model")
            return [*FINETUNE, "--data", "a.tar"]
        for place, kept in (("set/a", members), ("set/b", [("good.jpg", JPEG)])):
            (folder / place).mkdir(parents=True)
            for label, data in kept:
                (folder / place / label).write_bytes(data)
        model = str(world.model)
        match command:
            case "embed":
                return ["embed", model, "set", "--out", "out", "--precision", "float32", "--json"]
            case "classify":
                return ["classify", "set", "--labels", "a", "b", "--model", model, "--json"]
        (folder / "mine.toml").write_text("[data]\npath = 'set'\n")
        return ["evaluate", "--model", model, "--suite", "mine.toml", "--out", "out", "--json", "--device", "cpu"]

    def answered(outcome: Outcome) -> str | None:
        skipped = outcome.err.count(": skipped, ")
        return None if len(outcome.out.splitlines()) + skipped == count + 1 else f"{skipped} skipped of {count}"

    check = {"embed": accounted(count + 1), "classify": answered}.get(command, went_on)
    return Case(
        KIND, f"{command}: {name}", make, check=check, inputs=count, peak=2000 * MIB if "9999" in name else 1200 * MIB
    )
