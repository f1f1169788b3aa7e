"""Sixty damaged tars: what is read and what is skipped, counted exactly; clean samples come out byte for byte."""

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from diptych.errors import ShardError
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.shards.loader import Loader
from diptych.tokenizer import Tokenizer
from samples import draw, encode, make_pairs

SAMPLES = 12
PAIRS = make_pairs(SAMPLES)
KEYS = [f"{i:04d}" for i in range(SAMPLES)]
PICTURES = dict(zip(KEYS, (pair.image for pair in PAIRS), strict=True))
CAPTIONS = dict(zip(KEYS, (pair.caption for pair in PAIRS), strict=True))


@dataclass(frozen=True)
class Part:
    """A member of the tar that is damaged: where it begins, its content, its end."""

    key: str
    suffix: str
    header: int
    content: int
    size: int

    @property
    def end(self) -> int:
        return self.content + -(-self.size // 512) * 512


def tar_of(members: list[tuple[str, bytes | tarfile.TarInfo]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def clean_members() -> list[tuple[str, bytes | tarfile.TarInfo]]:
    return [
        member
        for key in KEYS
        for member in ((f"{key}.jpg", PICTURES[key] or b""), (f"{key}.txt", CAPTIONS[key].encode()))
    ]


CLEAN = tar_of(clean_members())
with tarfile.open(fileobj=io.BytesIO(CLEAN)) as _tar:
    PARTS = {
        (name := info.name).replace(".", " "): Part(name[:4], name[5:], info.offset, info.offset_data, info.size)
        for info in _tar
    }


@dataclass(frozen=True)
class Case:
    """Bytes of a tar, which samples must be lost, and the reasons that must be given."""

    name: str
    data: bytes
    lost: set[str]
    reasons: dict[str, int]


def part(sample: int, suffix: str) -> Part:
    return PARTS[f"{KEYS[sample]} {suffix}"]


def cut(name: str, at: int, first_lost: int, **reasons: int) -> Case:
    return Case(name, CLEAN[:at], set(KEYS[first_lost:]), reasons)


def overwritten(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def flipped(at: int) -> bytes:
    return overwritten(CLEAN, at, bytes([CLEAN[at] ^ 0x10]))


def replaced(sample: int, change: Callable[[str], list[tuple[str, bytes | tarfile.TarInfo]]]) -> bytes:
    """The clean tar with other members in the place of one sample's."""
    key = KEYS[sample]
    before = [m for m in clean_members() if m[0][:4] < key]
    behind = [m for m in clean_members() if m[0][:4] > key]
    return tar_of(before + change(key) + behind)


def with_file(suffix: str, content: bytes | tarfile.TarInfo) -> Callable[[str], list]:
    """The sample with one of its two files changed, or one more."""

    def change(key: str) -> list:
        files: dict[str, bytes | tarfile.TarInfo] = {"jpg": PICTURES[key] or b"", "txt": CAPTIONS[key].encode()}
        files[suffix] = content
        return [(f"{key}.{ending}", data) for ending, data in files.items()]

    return change


def without(suffix: str) -> Callable[[str], list]:
    return lambda key: [m for m in clean_members() if m[0][:4] == key and not m[0].endswith(suffix)]


def with_details(details: bytes) -> Callable[[str], list]:
    """The sample with JSON in the place of its text."""
    return lambda key: [*without("txt")(key), (f"{key}.json", details)]


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def truncations() -> list[Case]:
    cases = [Case("cut to nothing", b"", set(KEYS), {"truncated": 1})]
    for i in (0, 1, 5, 11):
        picture, text = part(i, "jpg"), part(i, "txt")
        cases += [
            cut(f"cut in the header of picture {i}", picture.header + 100, i, truncated=1),
            cut(f"cut inside picture {i}", picture.content + picture.size // 2, i, truncated=1),
            cut(f"cut before text {i}", text.header, i, truncated=1, no_caption=1),
            cut(f"cut inside text {i}", text.content + 2, i, truncated=1),
        ]
    cases.append(Case("cut before the end's empty blocks", CLEAN[: part(11, "txt").end], set(), {"truncated": 1}))
    return cases


def bit_flips() -> list[Case]:
    cases = []
    for i in (0, 4, 11):
        key = {KEYS[i]}
        for where, at in (("name", 2), ("size", 124 + 8), ("checksum", 148 + 2)):
            cases += [
                Case(
                    f"bit of the {where} of picture {i}",
                    flipped(part(i, "jpg").header + at),
                    key,
                    {"damaged_header": 1, "no_image": 1},
                ),
                Case(
                    f"bit of the {where} of text {i}",
                    flipped(part(i, "txt").header + at),
                    key,
                    {"damaged_header": 1, "no_caption": 1},
                ),
            ]
        picture = part(i, "jpg")
        cases.append(Case(f"first byte of picture {i}", flipped(picture.content), key, {"not_a_picture": 1}))
        cases.append(
            Case(
                f"text {i} that is not UTF-8",
                overwritten(CLEAN, part(i, "txt").content, b"\xff"),
                key,
                {"bad_text": 1},
            )
        )
    return cases


def zero_blocks() -> list[Case]:
    cases = []
    for i in (0, 6):
        picture, text = part(i, "jpg"), part(i, "txt")
        cases += [
            Case(
                f"header of picture {i} zeroed",
                overwritten(CLEAN, picture.header, bytes(512)),
                {KEYS[i]},
                {"damaged_header": 1, "no_image": 1},
            ),
            Case(
                f"text {i} zeroed, header and all",
                overwritten(CLEAN, text.header, bytes(1024)),
                {KEYS[i]},
                {"zero_blocks": 1, "no_caption": 1},
            ),
        ]
    cases.append(
        Case(
            "two tars joined",
            tar_of(clean_members()[:10]) + tar_of(clean_members()[10:]),
            set(),
            {"zero_blocks": 1},
        )
    )
    return cases


def arrangements() -> list[Case]:
    def interleaved(members: list) -> list:
        a, b = members[4:6], members[6:8]
        return [*members[:4], a[0], b[0], a[1], b[1], *members[8:]]

    deep = b"[" * 100_000
    wrong_types = [
        ("a folder as picture", with_file("jpg", special(tarfile.DIRTYPE)), "no_image"),
        ("a symbolic link as picture", with_file("jpg", special(tarfile.SYMTYPE, "/etc/passwd")), "not_a_file"),
        ("a hard link as picture", with_file("jpg", special(tarfile.LNKTYPE, "0000.jpg")), "not_a_file"),
        ("a device as text", with_file("txt", special(tarfile.CHRTYPE)), "not_a_file"),
        ("text as picture", with_file("jpg", b"this is no picture"), "not_a_picture"),
        ("an empty picture", with_file("jpg", b""), "empty_image"),
        ("an empty text", with_file("txt", b" \n"), "empty_caption"),
        ("a truncated picture", with_file("jpg", encode(draw("red", "circle"))[:400]), "truncated"),
        ("JSON that is a list", with_file("json", b"[1]"), "bad_text"),
        ("JSON nested too deep", with_file("json", deep), "bad_text"),
        ("JSON that is UTF-16", with_details('{"caption": "a"}'.encode("utf-16")), "bad_text"),
        ("half a surrogate", with_details(b'{"caption": "\\ud800"}'), "bad_text"),
        ("a caption that is a number", with_details(b'{"caption": 7}'), "empty_caption"),
    ]
    return [
        Case("a picture without text", replaced(3, without("txt")), {KEYS[3]}, {"no_caption": 1}),
        Case("a text without picture", replaced(3, without("jpg")), {KEYS[3]}, {"no_image": 1}),
        Case(
            "two samples interleaved",
            tar_of(interleaved(clean_members())),
            {KEYS[2], KEYS[3]},
            {"no_caption": 2, "duplicate_key": 2},
        ),
        Case("the last sample again", tar_of(clean_members() + clean_members()[-2:]), set(), {"duplicate_key": 1}),
        Case("the first sample again", tar_of(clean_members() + clean_members()[:2]), set(), {"duplicate_key": 1}),
        *(Case(name, replaced(7, change), {KEYS[7]}, {reason: 1}) for name, change, reason in wrong_types),
    ]


CASES = truncations() + bit_flips() + zero_blocks() + arrangements()


def test_there_are_at_least_sixty():
    assert len({case.name for case in CASES}) == len(CASES) >= 60


def read_all(folder: Path) -> tuple[dict[str, tuple[bytes | None, str]], Counter[str]]:
    """key -> (picture's bytes, caption) of every usable sample, and what was skipped; read as training reads."""
    dataset = load_dataset(folder)
    reasons = Counter(reason for *_, reason in dataset.skipped)
    count = len(dataset)
    loader = Loader(
        [SourceConfig(path=folder)], LoaderConfig(batch_size=max(2, count), workers=0), 32, Tokenizer.clip()
    )
    batch = loader.read_batch(loader.position)
    broken = set(batch.skipped)
    reasons.update(reason for _, reason in broken)
    unusable = {key for key, _ in broken}
    return {p.key: (p.image, p.caption) for p in dataset.pairs if p.key not in unusable}, reasons


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_counts_are_exact_and_clean_samples_whole(tmp_path, monkeypatch, case):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(case.data)
    kept = [key for key in KEYS if key not in case.lost]
    if len(kept) < 2:  # nothing to train on: the error has the counts
        if not kept:
            with pytest.raises(ShardError, match="no usable sample") as caught:
                load_dataset(folder)
            assert str(case.reasons) in str(caught.value) or case.name.startswith("cut")
        return
    found, reasons = read_all(folder)
    assert found == {key: (PICTURES[key], CAPTIONS[key].strip()) for key in kept}
    assert reasons == case.reasons


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_strict_stops_at_the_first(tmp_path, monkeypatch, case):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(case.data)
    config = LoaderConfig(batch_size=2, workers=0, strict=True)
    with pytest.raises(ShardError, match=r"no usable sample|" + "|".join(case.reasons)):
        read_in_training(folder, config)


def read_in_training(folder: Path, config: LoaderConfig) -> None:
    batches = iter(Loader([SourceConfig(path=folder)], config, 32, Tokenizer.clip()))
    for _ in range(SAMPLES):
        next(batches)


def test_strict_reads_a_clean_tar(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "00000.tar").write_bytes(CLEAN)
    config = LoaderConfig(batch_size=SAMPLES, workers=0, strict=True)
    loader = Loader([SourceConfig(path=tmp_path / "00000.tar")], config, 32, Tokenizer.clip())
    assert sorted(next(iter(loader)).keys) == KEYS
