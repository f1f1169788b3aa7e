"""What lies where in a tar: headers are scanned, members are read in place, nothing is ever extracted.

The scanner is written for broken files: a damaged header or a truncated end is reported and the scan goes on at the
next header that holds together.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
MAX_NAME = 1 << 20
"""Bytes of a long name or of PAX records that are looked at."""
_ZERO = bytes(BLOCK)
_REGULAR = b"0\0007"  # type flags of an ordinary file; old tars write NUL, 7 asks for one in one piece
_FOLDER = b"5"
_NO_CONTENT = b"123456"  # links, devices, folders, pipes: some tools write a size, but never what it is of
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_SPARSE = b"S"  # GNU's: blocks with more of the map of holes stand before the content, and its size is without them


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar."""

    name: str
    offset: int
    """First byte of its content in the tar."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Damage:
    """A stretch of the tar that is no member."""

    reason: str
    """`damaged_header`, `zero_blocks` (an end, with more behind it), `truncated` or `not_a_file` (links, devices,
    files with holes that are left out)."""
    offset: int
    """Where it begins, bytes."""
    name: str = ""
    """The member it hit, if that is known."""


def iter_members(path: Path) -> Iterator[Member | Damage]:
    """Walk the regular members of a tar in file order (ustar, GNU long names and PAX)."""
    if path.stat().st_size == 0:
        yield Damage("truncated", 0)
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        yield from _scan(tar)


def _scan(tar: mmap.mmap) -> Iterator[Member | Damage]:
    position, end = 0, len(tar)
    long_name, pax = "", {}
    in_damage, next_header = False, -1
    while position + BLOCK <= end:
        header = tar[position : position + BLOCK]
        if header == _ZERO:
            behind = _skip_zeros(tar, position)
            is_end = behind - position >= 2 * BLOCK or behind == end
            if is_end and next_header < behind:  # looked for once, however many runs of zeros there are before it
                next_header = _find_header(tar, behind)
            if is_end and next_header == end:
                return  # what tools pad behind the two empty blocks that end a tar is not ours
            if is_end:
                yield Damage("zero_blocks", position)
                long_name, pax = "", {}
            position = behind
            continue
        size = _size(header, pax)
        if size is None:
            if not in_damage:
                yield Damage("damaged_header", position)
            in_damage, long_name, pax = True, "", {}
            position += BLOCK
            continue
        in_damage = False
        kind = header[156:157]
        content = position + BLOCK
        more = header[482] if kind == _SPARSE else 0
        while more and content + BLOCK <= end:
            more = tar[content + 504]
            content += BLOCK
        size = 0 if kind in _NO_CONTENT else size
        position = content + -(-size // BLOCK) * BLOCK
        if kind == _LONG_NAME:
            long_name = _text(tar[content : content + min(size, MAX_NAME)])
            continue
        if kind == _PAX:
            pax = _read_pax(tar[content : content + min(size, MAX_NAME)])
            continue
        if kind in (_PAX_GLOBAL, _LONG_LINK):
            continue
        name = pax.get("GNU.sparse.name") or pax.get("path") or long_name or _name(header)
        sparse = any(key.startswith("GNU.sparse.") for key in pax)
        long_name, pax = "", {}
        if kind == _FOLDER or name.endswith("/"):
            continue
        if kind not in _REGULAR or sparse:  # links, devices, pipes, sparse files: never followed
            yield Damage("not_a_file", content, name)
            continue
        if content + size > end:
            yield Damage("truncated", content, name)
            return
        yield Member(name, content, size)
    if not in_damage:
        yield Damage("truncated", end)  # whole members, but the empty blocks that end a tar never came


def _skip_zeros(tar: mmap.mmap, position: int) -> int:
    """The first block from `position` on that is not empty."""
    while tar[position : position + BLOCK] == _ZERO:
        position += BLOCK
    return position


def _find_header(tar: mmap.mmap, position: int) -> int:
    """Where the first header from `position` on stands; the end of the tar if there is none."""
    starts = range(position, len(tar) - BLOCK + 1, BLOCK)
    return next((start for start in starts if _size(tar[start : start + BLOCK], {}) is not None), len(tar))


def _size(header: bytes, pax: dict[str, str]) -> int | None:
    """Bytes of the member that a header announces; None if it is no header that holds together."""
    try:
        stored, size = _number(header[148:156]), _number(header[124:136])
        if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return None
        size = int(pax.get("size", size))
    except ValueError:
        return None
    return size if size >= 0 else None


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256, for members of 8 GiB and more
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:262] == b"ustar" and header[257:263] != b"ustar " else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _read_pax(content: bytes) -> dict[str, str]:
    """Records `length key=value\\n`; a record that does not hold together ends the list."""
    records: dict[str, str] = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        content = content[int(length) :]
    return records
