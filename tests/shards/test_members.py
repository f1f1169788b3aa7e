import io
import shutil
import subprocess
import tarfile

import pytest

from diptych.shards.members import BLOCK, Damage, Member, iter_members
from samples import write_tar

NAMES = ["a.jpg", "b/c.txt", "x" * 120 + "/" + "y" * 120 + ".json", "ключ.jpg"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    path = tmp_path / "a.tar"
    names = NAMES if format != tarfile.USTAR_FORMAT else NAMES[:2]
    with tarfile.open(path, "w", format=format) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1000 * i
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    with tarfile.open(path) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar]
    assert list(iter_members(path)) == expected


def test_links_folders_and_devices_are_no_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "l.jpg"), (tarfile.DIRTYPE, "d"), (tarfile.CHRTYPE, "dev.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = list(iter_members(path))
    assert [(one.name, one.reason) for one in found if isinstance(one, Damage)] == [
        (n, "not_a_file") for n in ("l.jpg", "dev.jpg")
    ]
    assert len(found) == 2


def sparse_tar(path, format):
    """A file of holes, as GNU's tar writes it, and a picture behind it."""
    with open(path / "holes.jpg", "wb") as file:
        for i in range(30):
            file.seek(i * 100_000)
            file.write(b"x" * 4096)
    (path / "b.jpg").write_bytes(b"B" * 600)
    subprocess.run(
        ["tar", "--sparse", f"--format={format}", "-cf", "a.tar", "holes.jpg", "b.jpg"], cwd=path, check=True
    )
    return path / "a.tar"


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_files_with_holes_are_named_and_left_out(tmp_path, format):
    holes, picture = iter_members(sparse_tar(tmp_path, format))
    assert isinstance(holes, Damage)
    assert (holes.name, holes.reason) == ("holes.jpg", "not_a_file")
    assert isinstance(picture, Member)
    assert (picture.name, picture.size) == ("b.jpg", 600)


def test_a_damaged_header_is_reported_and_the_scan_goes_on(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"A" * 600), ("b.jpg", b"B" * 600), ("c.jpg", b"C")])
    data = bytearray(path.read_bytes())
    second = BLOCK + 1024
    data[second + 3] ^= 0xFF
    path.write_bytes(data)
    found = list(iter_members(path))
    assert [item.name for item in found if isinstance(item, Member)] == ["a.jpg", "c.jpg"]
    assert [item for item in found if isinstance(item, Damage)] == [Damage("damaged_header", second)]


@pytest.mark.parametrize("keep", [1, 300, BLOCK, BLOCK + 1, BLOCK + 700, 2 * BLOCK + 1024])
def test_a_truncated_tar_says_so(tmp_path, keep):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"A" * 600), ("b.jpg", b"B" * 600)])
    path.write_bytes(path.read_bytes()[:keep])
    *_, last = iter_members(path)
    assert isinstance(last, Damage)
    assert last.reason == "truncated"


def test_an_empty_file_is_a_truncated_tar(tmp_path):
    (tmp_path / "a.tar").touch()
    assert list(iter_members(tmp_path / "a.tar")) == [Damage("truncated", 0)]


def test_large_sizes_are_read_as_gnu_writes_them(tmp_path):
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 * 2**30
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(BLOCK))
    assert list(iter_members(tmp_path / "a.tar")) == [Damage("truncated", BLOCK, "big.jpg")]
