"""What is taken for an image, everywhere alike."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from diptych.cli.classify import find_pictures
from diptych.embed.bulk.inputs import open_inputs
from diptych.errors import UsageError
from diptych.image_file import IMAGE_SUFFIXES, SUFFIXES, find_format, find_images
from diptych.shards.index import load_index

OPTIONAL = {"JPEG2000": "jpg_2000", "AVIF": "avif"}
READABLE = [name for name in SUFFIXES if name != "HEIF" and features.check(OPTIONAL.get(name, "jpg"))]


def encode(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(buffer, name)
    return buffer.getvalue()


@pytest.mark.parametrize("name", READABLE)
def test_a_format_is_told_by_its_first_bytes(name):
    assert find_format(encode(name)) == name


@pytest.mark.parametrize("data", [b"", b"RIFF0000WAVE", b"%!PS-Adobe EPSF", b"<html>", b"0000ftypqt  0000", b"\0" * 64])
def test_other_bytes_are_of_no_format(data):
    assert find_format(data) is None


def test_one_folder_holds_the_same_images_for_every_command(tmp_path):
    data = encode("PNG")
    folder = tmp_path / "images"
    folder.mkdir()
    for suffix in (*IMAGE_SUFFIXES, ".JPG", ".txt", ".cr2"):
        (folder / f"{suffix[1:]}{suffix}").write_bytes(data)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number, path in enumerate(sorted(path for path in folder.iterdir() if path.suffix != ".txt")):
            for name, content in ((f"{number}{path.suffix}", data), (f"{number}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    expected = len(IMAGE_SUFFIXES) + 1
    names, others = find_images(folder)
    assert len(names) == expected
    assert others == {".txt": 1, ".cr2": 1}
    assert len(find_pictures([str(folder)])[0]) == expected
    (source,) = open_inputs([str(folder)])
    assert source.rows == expected
    assert len(load_index(tmp_path / "images.tar")) == expected
    (source,) = open_inputs([str(tmp_path / "images.tar")])
    assert source.rows == expected


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    locked = tmp_path / "cats" / "locked"
    locked.mkdir(parents=True)
    (tmp_path / "cats" / "a.png").write_bytes(encode("PNG"))
    list_folder = os.scandir

    def lock(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", lock)  # a mode would not hold root back
    with pytest.raises(UsageError, match="locked cannot be listed"):
        find_images(tmp_path)
