"""Records of a WARC or WAT file, streamed: gzip members are unpacked piece by piece, damage costs what is damaged.

`read_records` yields a `Record` for each record of a wanted type and a `Damage` for each stretch that cannot be read;
after one it goes on at the next gzip member, or at the next line that begins a record. A record with a gzip
member to itself, as is usual, is only yielded when the check sum of all its bytes was right. Memory is bounded by the
limit on a record, whatever a header or a compressed stream claims: a longer record is unpacked and thrown away, and
given up for the next gzip member if it goes on for more than 256 MiB.

A header that claims too long a block costs its own record: the next gzip member begins another. In a file that is not
gzip, the block is followed by line ends and another record, or its length is not believed and reading goes back to the
first line in it that begins a record. That needs a file that can seek, and is done for 4 GiB a file at most.
"""

import re
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

_CHUNK = 1 << 16
_MOST_OUT = 1 << 20
_MOST_HEADER = 1 << 16
_MOST_SKIPPED = 256 << 20
_MAX_REREAD = 4 << 30
_PROBE = 1024
_MAGIC = b"\x1f\x8b\x08"
_LINE = b"\nWARC/1."
_BEGIN = re.compile(rb"WARC/\d\.\d\r?\n")
_NO_LINE_END = re.compile(rb"[^\r\n]")
_HEADER_END = re.compile(rb"\r?\n\r?\n")

DAMAGED = "record_damaged"
TRUNCATED = "record_truncated"
TOO_LARGE = "record_too_large"


@runtime_checkable
class Readable(Protocol):
    """What bytes come from."""

    def read(self, size: int, /) -> bytes:
        """At most so many; none at the end."""
        ...


@runtime_checkable
class Seekable(Readable, Protocol):
    """Where one can go back to what was read."""

    def seek(self, place: int, /) -> int:
        """To a place from the beginning."""
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """One record."""

    offset: int
    """Offset of the gzip member, or of the record in a plain file."""
    headers: dict[str, str]
    """Headers of the WARC record, names in lower case."""
    body: bytes
    """Its block; only the beginning if `cut`."""
    cut: bool
    """Whether the block is longer than the limit."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch that gave no record."""

    offset: int
    reason: str


class _DamagedError(Exception):
    def __init__(self, reason: str, *, lost: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost  # whether what was unpacked of this record is of no more use


class _Unpacked:
    """The bytes of a file, unpacked if it is gzip, in pieces that never span two members."""

    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._input = raw.read(_CHUNK)
        self._taken = 0  # bytes of the file before `_input`
        self.gzip = self._input[:2] == _MAGIC[:2]
        self._member: zlib._Decompress | None = None
        self._first = False  # whether nothing of this member was given yet
        self._seen: deque[bytes] = deque(maxlen=2)  # what this member was given, to look for the next one in
        self.offset = 0
        """Where the member or plain piece given last begins."""

    def next_piece(self) -> tuple[bytes, bool]:
        """Some bytes, and whether they begin a member; nothing at the end of the file."""
        if not self.gzip:
            self.offset = self._taken
            piece, first = self._input, self._taken == 0
            self._advance(b"")
            return piece, first
        while True:
            piece = self.rest_of_member()
            if piece:
                first, self._first = self._first, False
                return piece, first
            if not self._start_member():
                return b"", False

    def rest_of_member(self) -> bytes:
        """More of this member; nothing once it has ended and its check sum was right."""
        while self._member is not None:
            piece = self._unpack(self._member)
            if piece:
                return piece
        return b""

    def _start_member(self) -> bool:
        while not (rest := self._input.lstrip(b"\0")):  # some writers pad
            if not self._input:
                return False
            self._advance(b"")
        self._advance(rest)
        self.offset = self._taken
        self._member, self._first = zlib.decompressobj(31), True
        self._seen.clear()
        self._seen.append(self._input)
        return True

    def _unpack(self, member: "zlib._Decompress") -> bytes:
        if not self._input:
            self._member = None
            raise _DamagedError(TRUNCATED, lost=True)
        try:
            piece = member.decompress(self._input, _MOST_OUT)
        except zlib.error:
            self.resynchronise()
            raise _DamagedError(DAMAGED, lost=True) from None
        if member.eof:
            self._advance(member.unused_data)
            self._member = None
        elif member.unconsumed_tail:
            self._taken += len(self._input) - len(member.unconsumed_tail)
            self._input = member.unconsumed_tail
        else:
            self._advance(b"")
            self._seen.append(self._input)
        return piece

    def _advance(self, rest: bytes) -> None:
        """Go on with what is left of the input, or with the next of the file."""
        self._taken += len(self._input) - len(rest)
        self._input = rest or self._raw.read(_CHUNK)

    def go_back(self, place: int) -> bool:
        """To a place in a plain file; False if that is not possible."""
        if not isinstance(self._raw, Seekable):
            return False
        try:
            self._raw.seek(place)
        except (OSError, ValueError):  # a pipe, or a server that gives no ranges
            return False
        self._taken, self._input = place, self._raw.read(_CHUNK)
        return True

    def resynchronise(self) -> None:
        """Give this member up and find the beginning of the next one."""
        if self._member is None:
            return  # it has just ended
        self._member = None
        window = b"".join(self._seen)
        self._taken += len(self._input) - len(window)
        place = 1
        while True:
            found = window.find(_MAGIC, place)
            place = found if found >= 0 else max(place, len(window) - len(_MAGIC) + 1)
            if found < 0 or len(window) - found < _PROBE:  # too little to tell
                more = self._raw.read(_CHUNK)
                if more:
                    self._taken += min(place, len(window))
                    window, place = window[place:] + more, 0
                    continue
            if found < 0:
                self._taken, self._input = self._taken + len(window), b""
                return
            if _begins_member(window[found : found + _PROBE]):
                self._taken, self._input = self._taken + found, window[found:]
                return
            place = found + 1


def _begins_member(data: bytes) -> bool:
    """Three bytes are no proof: they also stand inside of compressed data."""
    try:
        return bool(zlib.decompressobj(31).decompress(data, 16))
    except zlib.error:
        return False


class _Reader:
    """Cuts the unpacked bytes into records."""

    def __init__(self, raw: Readable, wanted: Collection[str], limit: int) -> None:
        self._source = _Unpacked(raw)
        self._wanted, self._limit = wanted, limit
        self._buffer, self._place = b"", 0
        self._base = 0  # offset of the buffer in a plain file, of its member in a gzip file
        self.offset = 0
        self._inner, self._tail = -1, b""  # see `_note_candidate`
        self._again = 0  # bytes of a plain file that were read a second time

    def read(self) -> Record | None:
        """The next wanted record; None at the end of the file."""
        while self._find_start():
            headers = self._read_header()
            try:
                length = int(headers["content-length"])
            except (KeyError, ValueError):
                raise _DamagedError(DAMAGED) from None
            if length < 0:
                raise _DamagedError(DAMAGED)
            if headers.get("warc-type") not in self._wanted:
                self._take(length, 0)
                continue
            body = self._take(length, min(length, self._limit))
            self._check_sum()
            return Record(self.offset, headers, body, length > self._limit)
        return None

    @property
    def damaged_at(self) -> int:
        """Offset of the record, or of the gzip member, that was being read last."""
        return max(self.offset, self._source.offset) if self._source.gzip else self.offset

    def recover(self, lost: bool) -> None:
        """After damage: go to what looks like the next record. What is damaged on the way is not counted again."""
        while True:
            if lost:
                self._buffer, self._place = b"", 0
            match = _BEGIN.search(self._buffer, self._place)
            if match:
                self._place = match.start()
                return
            try:
                if not self._fill(self._buffer[max(self._place, len(self._buffer) - 12) :]):
                    self._buffer, self._place = b"", 0
                    return
                lost = False
            except _DamagedError:
                lost = True

    def _fill(self, rest: bytes) -> bool:
        piece, _ = self._source.next_piece()
        if not self._source.gzip or not rest:
            self._base = self._source.offset - (0 if self._source.gzip else len(rest))
        self._buffer, self._place = rest + piece, 0
        return bool(piece)

    def _check_sum(self) -> None:
        """If only line ends follow, read this member to its end."""
        while not _NO_LINE_END.search(self._buffer, self._place):
            piece = self._source.rest_of_member()
            if not piece:
                return
            self._buffer, self._place = piece, 0

    def _skip_line_ends(self) -> bool:
        """Go to the next byte that is no line end; False at the end of the file."""
        while not (match := _NO_LINE_END.search(self._buffer, self._place)):
            if not self._fill(b""):
                return False
        self._place = match.start()
        return True

    def _find_start(self) -> bool:
        if not self._skip_line_ends():
            return False
        while len(self._buffer) - self._place < 12:
            if not self._fill(self._buffer[self._place :]):
                raise _DamagedError(TRUNCATED)
        self.offset = self._base if self._source.gzip else self._base + self._place
        if not _BEGIN.match(self._buffer, self._place):
            self._place += 1
            raise _DamagedError(DAMAGED)
        return True

    def _read_header(self) -> dict[str, str]:
        while not (end := _HEADER_END.search(self._buffer, self._place)):
            if len(self._buffer) - self._place > _MOST_HEADER:
                self._place += 1
                raise _DamagedError(DAMAGED)
            if not self._fill(self._buffer[self._place :]):
                raise _DamagedError(TRUNCATED)
        lines = self._buffer[self._place : end.start()].decode("utf-8", "replace").split("\n")
        self._place = end.end()
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return headers

    def _take(self, length: int, keep: int) -> bytes:
        """The first `keep` of `length` bytes; the others are thrown away."""
        self._inner, self._tail = -1, b"\n"
        used = min(length, len(self._buffer) - self._place)
        parts = [self._buffer[self._place : self._place + min(used, keep)]]
        self._note_candidate(self._buffer[self._place : self._place + used], self._base + self._place)
        self._place += used
        kept, left = len(parts[0]), length - used
        while left:
            if length - left > max(_MOST_SKIPPED, self._limit):
                self._skip_to_next_record()
            piece, first = self._source.next_piece()
            if not piece:
                self._rewind_to_candidate()
                raise _DamagedError(TRUNCATED, lost=True)
            if first and _BEGIN.match(piece):  # the length was a lie: this is the next record
                self._buffer, self._place, self._base = piece, 0, self._source.offset
                raise _DamagedError(TRUNCATED)
            used = min(left, len(piece))
            if kept < keep:
                parts.append(piece[: min(used, keep - kept)])
                kept += len(parts[-1])
            self._note_candidate(piece[:used], self._source.offset)
            left -= used
            if not left:
                self._buffer, self._place, self._base = piece, used, self._source.offset
        if self._inner >= 0 and not self._ends_here():
            self._rewind_to_candidate()
        return b"".join(parts)

    def _note_candidate(self, data: bytes, offset: int) -> None:
        """Remember where the first line in a block of a plain file is that looks like the beginning of a record."""
        if self._inner >= 0 or self._source.gzip:
            return
        data = self._tail + data
        found = data.find(_LINE)
        if found >= 0:
            self._inner = offset - len(self._tail) + found + 1
        self._tail = data[1 - len(_LINE) :]

    def _ends_here(self) -> bool:
        """Whether line ends and another record follow, or the end of the file."""
        while len(self._buffer) - self._place < _PROBE and self._fill(self._buffer[self._place :]):
            pass
        match = _NO_LINE_END.search(self._buffer, self._place)
        return match is None or _BEGIN.match(self._buffer, match.start()) is not None

    def _skip_to_next_record(self) -> None:
        """A block goes on and on: leave it for the next member or what looks like a record in it, if there is one."""
        if self._source.gzip:
            self._source.resynchronise()
            raise _DamagedError(TOO_LARGE, lost=True)
        self._rewind_to_candidate()

    def _rewind_to_candidate(self) -> None:
        """Go back to what looks like a record in a block whose length is wrong."""
        if self._inner < 0:
            return
        again = self._source.offset - self._inner
        if self._again + again <= _MAX_REREAD and self._source.go_back(self._inner):
            self._again += again
            raise _DamagedError(TRUNCATED, lost=True)


def read_records(raw: Readable, wanted: Collection[str], limit: int) -> Iterator[Record | Damage]:
    """Records of the wanted types with at most `limit` bytes of each, and what was damaged, in the file's order."""
    reader = _Reader(raw, wanted, limit)
    while True:
        try:
            record = reader.read()
        except _DamagedError as error:
            yield Damage(reader.damaged_at, error.reason)
            reader.recover(error.lost)
            continue
        if record is None:
            return
        yield record
