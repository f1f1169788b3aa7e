"""Tars: damaged at random, headers that lie, names that lead out, members that are no files, samples that are none."""

import io
import random
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from strangers.case import Case, World, damage_bytes, refused_or_right
from strangers.places import PLACES
from strangers.world import JPEG

KIND = "tars"
COMMANDS = [name for name, place in PLACES.items() if place.holds == "tar"]
Member = tuple[str, bytes]
GOOD: list[Member] = [(f"{i}.{s}", d) for i in range(8) for s, d in (("jpg", JPEG), ("txt", b"a red circle"))]


def pack(
    members: list[Member], format: int = tarfile.PAX_FORMAT, change: Callable[[tarfile.TarInfo], None] | None = None
) -> bytes:
    """A tar whose first member was changed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change and number == 0:
                change(info)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(field: slice, value: bytes) -> Callable[[], bytes]:
    """The first header with another value in a field, and a sum that fits."""

    def build() -> bytes:
        data = bytearray(pack(GOOD, tarfile.USTAR_FORMAT))
        data[field] = value.ljust(field.stop - field.start, b"\0")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        return bytes(data)

    return build


def typed(kind: bytes, target: str = "/etc/passwd") -> Callable[[], bytes]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, target, 0

    return lambda: pack([("0.jpg", b""), *GOOD[1:]], change=change)


def pax(**records: str) -> Callable[[], bytes]:
    def change(info: tarfile.TarInfo) -> None:
        info.pax_headers = {name.replace("__", "."): value for name, value in records.items()}

    return lambda: pack(GOOD, change=change)


def named(name: str) -> Callable[[], bytes]:
    return lambda: pack([(f"{name}.jpg", JPEG), (f"{name}.txt", b"a red circle"), *GOOD])


def sample(*members: Member) -> Callable[[], bytes]:
    return lambda: pack([*members, *GOOD[2:]])


def raw_pax(text: bytes) -> Callable[[], bytes]:
    """Extended records as they are."""
    return lambda: (
        pack([("x", text)], tarfile.USTAR_FORMAT, lambda info: setattr(info, "type", b"x"))[:-1024] + pack(GOOD)
    )


SIZE, CHECKSUM, MODE, NAME, MAGIC = slice(124, 136), slice(148, 156), slice(100, 108), slice(0, 100), slice(257, 265)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "size of 2^90": header(SIZE, b"\x80" + b"\xff" * 11),
    "size is negative": header(SIZE, b"\xff" * 12),
    "size is -512": header(SIZE, b"\xff" * 10 + b"\xfe\x00"),
    "size is no number": header(SIZE, b"99999999999"),
    "size of 8 GB": header(SIZE, b"77777777777"),
    "size with signs": header(SIZE, b" -1 "),
    "mode is no number": header(MODE, b"zzzzzzz"),
    "name of a NUL": header(NAME, b"\0.jpg"),
    "name of bytes": header(NAME, b"\xff\xfe\x1b[2J.jpg"),
    "another magic": header(MAGIC, b"ABCDEFGH"),
    "a symbolic link": typed(tarfile.SYMTYPE),
    "a hard link": typed(tarfile.LNKTYPE, "../../x"),
    "a device": typed(tarfile.CHRTYPE),
    "a pipe": typed(tarfile.FIFOTYPE),
    "a folder": typed(tarfile.DIRTYPE),
    "an unknown type": typed(b"Z"),
    "GNU sparse": typed(tarfile.GNUTYPE_SPARSE),
    "GNU long name": typed(tarfile.GNUTYPE_LONGNAME),
    "extended size of 10^30": pax(size="1" + "0" * 30),
    "extended size is negative": pax(size="-1"),
    "extended size is no number": pax(size="x"),
    "extended size of 5,000 digits": pax(size="9" * 5000),
    "extended name with a NUL": raw_pax(b"18 path=a\0b.jpg\n\n"),
    "extended name that leads out": pax(path="../../../tmp/x.jpg"),
    "extended sparse map": pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="9" * 18),
    "extended sparse map of the old kind": pax(GNU__sparse__map="0,1,2", GNU__sparse__size="99999999999999"),
    "extended records of length 0": raw_pax(b"0 a=b\n"),
    "extended records of a long length": raw_pax(b"9999999999 a=b\n"),
    "extended records without a sign": raw_pax(b"11 abcdefg\n"),
    "extended records that are no number": raw_pax(b"x" * 4000),
    "extended charset": pax(hdrcharset="BINARY", path="a\udcff.jpg"),
    "absolute name": named("/etc/cron.d/x"),
    "name that climbs": named("../../../x"),
    "name of escapes": named("\x1b]0;PWNED\x07\x1b[2J"),
    "name of markup": named("[bold][/red]"),
    "name from right to left": named("\u202egpj"),
    "name of 5,000 letters": named("x" * 5000),
    "name that is empty": sample((".jpg", JPEG), (".txt", b"x")),
    "name of dots": sample(("..jpg", JPEG), ("..txt", b"x"), ("a..b.jpg", JPEG), ("a..b.txt", b"x")),
    "key twice": lambda: pack([*GOOD, *GOOD]),
    "members not neighbours": lambda: pack(sorted(GOOD, key=lambda member: member[0][-3:])),
    "picture twice": sample(("0.jpg", JPEG), ("0.JPG", JPEG), ("0.png", JPEG), ("0.txt", b"x")),
    "caption of NUL": sample(("0.jpg", JPEG), ("0.txt", b"a\0b")),
    "caption of escapes": sample(("0.jpg", JPEG), ("0.txt", b"\x1b[2J\x1b]0;PWNED\x07")),
    "caption of UTF-16": sample(("0.jpg", JPEG), ("0.txt", "a red circle".encode("utf-16"))),
    "caption of half an emoji": sample(("0.jpg", JPEG), ("0.json", b'{"caption": "\\ud83d"}')),
    "caption of 50 MB": sample(("0.jpg", JPEG), ("0.txt", b"x" * (50 << 20))),
    "caption of 900,000 letters without a space": sample(("0.jpg", JPEG), ("0.txt", b"ab" * 450_000)),
    "caption of 900,000 accents": sample(("0.jpg", JPEG), ("0.txt", "e\u0301".encode() * 300_000)),
    "caption of entities in entities": sample(("0.jpg", JPEG), ("0.txt", b"&" + b"amp;" * 200_000)),
    "caption of an entity of 5,000 digits": sample(("0.jpg", JPEG), ("0.txt", b"&#" + b"9" * 5000 + b";")),
    "details nested deep": sample(("0.jpg", JPEG), ("0.txt", b"x"), ("0.json", b"[" * 100_000)),
    "details of a huge number": sample(("0.jpg", JPEG), ("0.txt", b"x"), ("0.json", b'{"a": ' + b"9" * 5000 + b"}")),
    "details that are a list": sample(("0.jpg", JPEG), ("0.txt", b"x"), ("0.json", b"[1, 2]")),
    "details of NaN": sample(("0.jpg", JPEG), ("0.txt", b"x"), ("0.json", b'{"caption": NaN, "x": 1e999}')),
    "details whose key is twice": sample(("0.jpg", JPEG), ("0.txt", b"x"), ("0.json", b'{"a": 1, "a": [2]}')),
    "class of 5,000 digits": sample(("0.jpg", JPEG), ("0.txt", b"x"), ("0.cls", b"9" * 5000)),
    "50,000 members of nothing": lambda: pack([(f"{i}.jpg", b"") for i in range(50_000)]),
    "zeros and rubbish": lambda: pack(GOOD)[:-1024] + (bytes(512) + b"rubbish ".ljust(512)) * 20_000,
    "rubbish before": lambda: b"rubbish " * 64 + pack(GOOD),
    "two tars, one behind the other": lambda: pack(GOOD) + pack([("z.jpg", JPEG), ("z.txt", b"x")]),
    "zeros": lambda: bytes(10_240),
    "gzip": lambda: b"\x1f\x8b\x08" + bytes(600),
    "a web page": lambda: b"<!DOCTYPE html><html>" + bytes(600),
    "one byte": lambda: b"x",
    "511 bytes": lambda: pack(GOOD)[:511],
    "no end": lambda: pack(GOOD)[:-10_000],
    "AppleDouble": lambda: pack([m for n, d in GOOD for m in (("._" + n, b"\0\5\26\7"), (n, d))]),
    "a header of 1 GB": lambda: header(SIZE, b"10000000000")()[:512].replace(b"0.jpg", b"0.jpg") + bytes(1024),
}


def iter_cases(world: World, seeds: int = 4) -> Iterator[Case]:
    plain = [where for where in COMMANDS if where != "train on shards"]  # whose index says what is in there
    for number, (name, build) in enumerate(HOSTILE.items()):
        for where in (plain[number % len(plain)], plain[(number + 1) % len(plain)]):  # all commands by turns
            make = PLACES[where].make(world, partial(_put, build))
            yield Case(KIND, f"{where}: {name}", make, check=refused_or_right, seconds=45)
    for where in COMMANDS:
        place = PLACES[where]
        for seed in range(seeds):
            put = partial(_spoil, f"{where} {seed}")
            yield Case(KIND, f"{where}: random damage {seed}", place.make(world, put), check=refused_or_right)


def _put(build: Callable[[], bytes], path: Path, sound: bytes) -> None:
    path.write_bytes(build())


def _spoil(seed: str, path: Path, sound: bytes) -> None:
    draws = random.Random(seed)
    for _ in range(draws.choice((1, 1, 3))):
        sound = damage_bytes(sound, draws) or b"\0"
    path.write_bytes(sound)
