"""Tars made at random, whole and damaged: nothing but our errors is raised, and no member is lost without a word."""

import io
import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from diptych.embed.sources import ShardSource
from diptych.image_file import IMAGE_SUFFIXES
from diptych.shards.index import build_index, is_metadata_of_macos, split_name
from diptych.shards.members import BLOCK, Damage, Member, iter_members
from samples import draw, encode

PICTURE = encode(draw("red", "dot"))
STEMS = [
    "a",
    "b",
    "d/a",
    "./a",
    "._a",
    "__MACOSX/._a",
    "d/.hidden",
    "ключ",
    "n" * 130,
    "pp/" * 45 + "q",
    "a b",
    "a\nb",
    ".",
]
SUFFIXES = [".jpg", ".JPG", ".png", ".txt", ".json", ".cls", ".heic", ".left.jpg", ".jpg.txt", "", "."]
CONTENTS = [
    PICTURE,
    b"a caption",
    b"\xff\xfe",
    b"",
    b" ",
    b'{"caption": "a dog", "label": 1}',
    b"[1]",
    b"{",
    b"x" * 1500,
]
LINKS = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
NO_FILES = [*LINKS, tarfile.GNUTYPE_SPARSE]
FILES = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE]
MEMBERS = st.tuples(
    st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(SUFFIXES)),
    st.sampled_from([*FILES * 4, *NO_FILES]),
    st.sampled_from(CONTENTS),
    st.sampled_from([{}, {}, {"comment": "é"}]),
)
QUICK = settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def make_tar(members: list, format: int) -> bytes:
    """A whole tar; links and folders may announce a size, as some writers do, and have no content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, kind, content, headers in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            info.pax_headers = headers if format == tarfile.PAX_FORMAT else {}
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "t" * 120 if format != tarfile.USTAR_FORMAT else "t"
            with suppress(ValueError):  # a name that is too long for ustar
                tar.addfile(info, None if kind in LINKS else io.BytesIO(content))
    return buffer.getvalue()


def check(path: Path) -> list[Member | Damage]:
    """Every member is used, passed over by its suffix, or counted by reason, and looking again changes nothing."""
    found = list(iter_members(path))
    damage = Counter(item.reason for item in found if isinstance(item, Damage))
    files = [item for item in found if isinstance(item, Member) and not is_metadata_of_macos(item.name)]

    index = build_index(path)
    skipped = Counter(reason for _, reason in index.skipped)
    keys = index.table["key"].to_pylist()
    told = {*keys, *(key for key, _ in index.skipped), ""}  # damage without a name has its offset for a key
    assert {split_name(item.name)[0] for item in files} <= told
    assert all(skipped[reason] >= count for reason, count in damage.items())
    again = build_index(path)
    assert (again.content_hash, again.skipped) == (index.content_hash, index.skipped)

    source = ShardSource.open(path, "image")
    lost = Counter(reason for _, reason in source.lost)
    suffixes = Counter(split_name(item.name)[1] for item in files)
    pictures = sum(count for suffix, count in suffixes.items() if f".{suffix}" in IMAGE_SUFFIXES)
    others = sum(count for suffix, count in suffixes.items() if suffix in ("txt", "json", "cls"))
    assert source.rows + lost.pop("duplicate_key", 0) == pictures
    assert sum(source.passed_over.values()) == len(files) - pictures - others
    assert lost == damage
    assert len(list(source.read(0, source.rows))) == source.rows
    assert ShardSource.open(path, "image") == source
    return found


@QUICK
@given(st.lists(MEMBERS, max_size=12), FORMATS)
def test_whole_tars_hold_what_tarfile_finds(members, format):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(make_tar(members, format))
        found = check(path)
        with tarfile.open(path) as tar:
            listed = [one for one in tar if not one.isdir()]
        regular = [one for one in listed if one.isreg() and not one.issparse()]
        assert [(one.name, one.size) for one in found if isinstance(one, Member)] == [(o.name, o.size) for o in regular]
        named = [one.name for one in found if isinstance(one, Damage)]
        assert named == [one.name for one in listed if one not in regular]
        assert all(one.reason == "not_a_file" for one in found if isinstance(one, Damage))


DAMAGES = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), st.floats(0, 1)),
        st.tuples(st.just("flip"), st.floats(0, 0.999)),
        st.tuples(st.just("zeros"), st.floats(0, 0.999)),
        st.tuples(st.just("swap"), st.floats(0, 0.999)),
    ),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, kinds: list[tuple[str, float]]) -> bytes:
    for kind, where in kinds:
        place = int(where * len(data))
        block = place // BLOCK * BLOCK
        if kind == "cut":
            data = data[:place]
        elif kind == "flip" and data:
            data = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        elif kind == "zeros":
            data = data[:block] + bytes(2 * BLOCK) + data[block:]
        else:
            data = data[block:] + data[:block]
    return data


@QUICK
@given(st.lists(MEMBERS, min_size=1, max_size=8), FORMATS, DAMAGES)
def test_damaged_tars_lose_nothing_without_a_word(members, format, kinds):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(damage(make_tar(members, format), kinds))
        check(path)
