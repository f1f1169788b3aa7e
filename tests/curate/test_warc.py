"""Records of archives, whole and damaged."""

import gzip
import io
import random
import re
import resource
import zlib
from itertools import accumulate

import pytest

from curate.archives import packed, page, record
from diptych.curate.pages import warc
from diptych.curate.pages.warc import DAMAGED, TOO_LARGE, TRUNCATED, Damage, Record, read_records

URLS = [f"http://a.example/{i}" for i in range(40)]


def make(seed: int, most: int = 3000) -> list[bytes]:
    """Records with blocks that compress badly, between requests that nobody wants."""
    draw = random.Random(seed)
    made = []
    for url in URLS:
        made.append(record("request", url, b"GET / HTTP/1.1\r\n\r\n"))
        made.append(page(url, draw.randbytes(draw.randint(0, most))))
    return made


def read(data: bytes, limit: int = 1 << 20) -> tuple[list[Record], list[str]]:
    found = list(read_records(io.BytesIO(data), {"response"}, limit))
    records = [one for one in found if isinstance(one, Record)]
    return records, [one.reason for one in found if isinstance(one, Damage)]


def blocks(records: list[bytes]) -> list[bytes]:
    return [one.partition(b"\r\n\r\n")[2][:-4] for one in records if b"WARC-Type: response" in one[:100]]


@pytest.mark.parametrize("most", [3000, 300_000], ids=["small", "large"])
@pytest.mark.parametrize("layout", ["member each", "one member", "plain", "members cut anywhere"])
def test_all_layouts_give_the_same_records(layout, most):
    made = make(1, most)
    plain = b"".join(made)
    data = {
        "member each": packed(made),
        "one member": gzip.compress(plain),
        "plain": plain,
        "members cut anywhere": packed([plain[i : i + 1777] for i in range(0, len(plain), 1777)], 1),
    }[layout]
    records, damage = read(data)
    assert [one.body for one in records] == blocks(made)
    assert [one.headers["warc-target-uri"] for one in records] == URLS
    assert damage == []
    if layout == "plain":
        assert all(data[one.offset : one.offset + 6] == b"WARC/1" for one in records)
    if layout == "member each":
        assert all(gzip.decompress(data[one.offset :][: len(packed([made[1]])) + most * 2])[:6] == b"WARC/1"
                   for one in records[-1:])  # fmt: skip


@pytest.mark.parametrize("most", [3000, 200_000], ids=["small", "large"])
@pytest.mark.parametrize("seed", range(15))
def test_damage_costs_what_is_damaged(seed, most):
    draw = random.Random(seed)
    members = [packed([one]) for one in make(seed, most)]
    hit = sorted(draw.sample(range(len(members)), 3))
    for number in hit:
        damaged = bytearray(members[number])
        what = draw.choice(["flip", "cut", "cut to nothing", "insert", "tail"])
        if what == "flip":
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        elif what == "cut":
            del damaged[draw.randrange(1, len(damaged)) :]
        elif what == "cut to nothing":
            del damaged[3:]
        elif what == "insert":
            place = draw.randrange(len(damaged))
            damaged[place:place] = draw.randbytes(50)
        else:
            damaged += draw.randbytes(draw.randint(1, 3000))
        members[number] = bytes(damaged)
    records, damage = read(b"".join(members))
    wanted = blocks(make(seed, most))
    whole = {URLS[i]: block for i, block in enumerate(wanted) if 2 * i + 1 not in hit}
    found = {one.headers["warc-target-uri"]: one.body for one in records}
    assert len(found) == len(records)
    assert whole.items() <= found.items()
    assert all(wanted[URLS.index(url)] == body for url, body in found.items()), "a damaged record was given out"
    assert len(damage) <= len(hit)
    starts = dict(zip(URLS, list(accumulate(map(len, members), initial=0))[1::2], strict=False))
    assert all(one.offset == starts[one.headers["warc-target-uri"]] for one in records)


def test_damage_in_a_plain_file_costs_what_is_damaged():
    made = make(2)
    made[9] = re.sub(rb"Content-Length: .*\r", b"Content-Length: 3\r", made[9])
    made[21] = b"garbage\r\n" * 1000
    made[41] = made[41].replace(b"Content-Length", b"Content-Breadth")
    records, damage = read(b"".join(made))
    wanted = [url for i, url in enumerate(URLS) if i not in (10, 20)]
    assert [one.headers["warc-target-uri"] for one in records] == wanted
    assert damage == [DAMAGED] * 3


def test_padding_and_headers_that_make_no_sense_cost_themselves_only():
    made = make(8)
    padded = b"".join(packed([one]) + bytes(i * 1000) for i, one in enumerate(made))
    records, damage = read(padded)
    assert ([one.body for one in records], damage) == (blocks(made), [])
    assert all(padded[one.offset :].startswith(b"\x1f\x8b") for one in records)
    made[9] = re.sub(rb"Content-Length: ", b"Content-Length: -", made[9])
    made[20] = b"WARC/1.0\r\n" + b"x: y\r\n" * 50_000
    records, damage = read(b"".join(made))
    assert [one.headers["warc-target-uri"] for one in records] == [url for i, url in enumerate(URLS) if i != 4]
    assert damage == [DAMAGED] * 2


def test_a_file_cut_short_gives_what_came_before():
    data = packed(make(3))
    records, damage = read(data[:-50])
    assert len(records) == 39
    assert damage == [TRUNCATED]
    assert read(b"") == ([], [])
    assert read(data[:5]) == ([], [TRUNCATED])
    assert read(b"no archive at all " * 9000) == ([], [DAMAGED])


def test_a_record_with_a_false_length_does_not_take_the_next_one_along():
    made = make(4)
    made[5] = made[5].replace(b"Content-Length: ", b"Content-Length: 1")
    records, damage = read(packed(made))
    assert [one.headers["warc-target-uri"] for one in records] == URLS[:2] + URLS[3:]
    assert damage == [TRUNCATED]


@pytest.mark.parametrize("claims", [b"1", b"9", b"9999", b"999999999"])
def test_a_false_length_in_a_plain_file_does_not_take_the_next_ones_along(claims):
    made = make(4)
    for number in (5, 20, 21, 78):  # 20 is a request, which nobody wants
        made[number] = made[number].replace(b"Content-Length: ", b"Content-Length: " + claims)
    records, damage = read(b"".join(made))
    assert [one.headers["warc-target-uri"] for one in records] == [URLS[i] for i in range(40) if i not in (2, 10)]
    assert [one.body for one in records] == [block for i, block in enumerate(blocks(made)) if i not in (2, 10)]
    assert damage == [TRUNCATED] * 4


def test_a_false_length_is_found_when_the_next_record_follows_at_once():
    made = make(4)
    made[4] = made[4].partition(b"\r\n\r\n")[0].replace(b"Content-Length: ", b"Content-Length: 1") + b"\r\n\r\n"
    records, damage = read(b"".join(made))
    assert [one.headers["warc-target-uri"] for one in records] == URLS
    assert damage == [TRUNCATED]


def test_going_back_for_false_lengths_ends_somewhere(monkeypatch):
    made = [one.replace(b"Content-Length: ", b"Content-Length: 99999") for one in make(4)]
    assert read(b"".join(made)) == ([], [TRUNCATED] * len(made))
    monkeypatch.setattr(warc, "_MAX_REREAD", 300_000)
    assert 1 < len(read(b"".join(made))[1]) < 9  # the last of these takes all that is left along


class Counting(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_a_false_length_is_not_followed_to_the_end_of_the_file(monkeypatch):
    monkeypatch.setattr(warc, "_MOST_SKIPPED", 1000)
    made = make(4)
    made[5] = made[5].replace(b"Content-Length: ", b"Content-Length: 99999")
    data = Counting(b"".join(made) + bytes(10 << 20))
    reader = read_records(data, {"response"}, 1 << 16)
    next(record for record in reader if isinstance(record, Damage))
    assert data.taken < 1 << 20


@pytest.mark.parametrize("inside", range(-20, 21))
def test_a_false_length_is_found_wherever_the_pieces_of_the_file_end(inside):
    first = page("http://a.example/1", b"x" * 70_000).replace(b"Content-Length: ", b"Content-Length: 1")
    made = [page("http://a.example/0", bytes(2 * 65_536 - len(first) - 178 + inside)), first]
    records, damage = read(b"".join([*made, page("http://a.example/2", b"y")]))
    assert [one.headers["warc-target-uri"][-1] for one in records] == ["0", "2"]
    assert damage == [TRUNCATED]


def test_records_inside_of_a_record_of_a_plain_file_are_its_own():
    inner = b"".join(make(7)[:6]) + b"\r\n" * 700
    made = [page("http://a.example/0", inner), page("http://a.example/1", inner * 30), page("http://a.example/2", b"x")]
    for ends in (b"", b"\r\n" * 3):
        records, damage = read(b"".join(made) + ends)
        assert [one.body for one in records] == blocks(made)
        assert damage == []


class Pipe:
    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


class Streaming(Pipe):
    def seek(self, place: int, /) -> int:
        raise ValueError(f"no seeking to {place} in a stream")


@pytest.mark.parametrize("kind", [Pipe, Streaming])
def test_a_file_that_cannot_seek_gives_what_comes_after_the_false_length(kind):
    made = make(4)
    made[5] = made[5].replace(b"Content-Length: ", b"Content-Length: 1")
    found = list(read_records(kind(b"".join(made)), {"response"}, 1 << 20))
    urls = [one.headers["warc-target-uri"] for one in found if isinstance(one, Record)]
    assert urls[:2] == URLS[:2]
    assert set(urls[3:]) < set(URLS[3:])
    assert URLS[-1] in urls


def test_a_bomb_takes_no_memory_and_costs_one_record():
    zeros = bytes(1 << 20)
    head = record("response", "http://b.example/", b"").replace(b"Content-Length: 0", b"Content-Length: %d" % (1 << 30))
    packer = zlib.compressobj(9, wbits=31)
    bomb = packer.compress(head[:-4]) + b"".join(packer.compress(zeros) for _ in range(1 << 10)) + packer.flush()
    made = make(5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records, damage = read(packed(made[:10]) + bomb + packed(made[10:]), limit=1 << 16)
    assert [one.body for one in records] == blocks(made)
    assert damage == [TOO_LARGE]
    assert records[5].offset == len(packed(made[:11])) + len(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_a_record_over_the_limit_is_cut_and_the_next_one_whole():
    made = [page("http://a.example/1", bytes(100_000)), page("http://a.example/2", b"x")]
    (first, second), damage = read(packed(made), limit=1000)
    assert (first.cut, len(first.body), second.cut, second.body[-1:], damage) == (True, 1000, False, b"x", [])


def test_what_looks_like_members_everywhere_is_read_in_bounded_time():
    assert read(packed(make(6)[:2]) + b"\x1f\x8b\x08\0" * 100_000)[1] == [DAMAGED]


def test_a_check_sum_that_comes_later_than_the_block_is_waited_for():
    piece, lengths = 1 << 16, set()  # of the file, read at a time
    for size in range(65_310, 65_350):
        member = packed([page("http://a.example/1", bytes(size))], 0)
        lengths.add(len(member))
        for place in (40_000, len(member) - 6):
            damaged = bytearray(member)
            damaged[place] ^= 1
            records, damage = read(bytes(damaged) + packed([page("http://a.example/2", b"x")]))
            assert [one.headers["warc-target-uri"] for one in records] == ["http://a.example/2"]
            assert damage == [DAMAGED]
    assert {piece + 4, piece + 8, piece + 12} <= lengths  # the first piece holds all but some of the last 8 bytes
