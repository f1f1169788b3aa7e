import os
from pathlib import Path

import pytest

from diptych import files
from diptych.errors import UsageError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_only_when_complete(tmp_path):
    def write_half():
        with files.atomic_folder(tmp_path / "whole") as folder:
            (folder / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".step_1.123.tmp").mkdir()
    (tmp_path / ".a.json.123.tmp").write_text("")
    (tmp_path / "step_1").mkdir()
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_leftovers_of_a_living_writer_and_of_other_names_stay_where_writers_share_a_folder(tmp_path):
    living, other = tmp_path / f".a.{os.getpid()}.tmp", tmp_path / ".b.4194999.tmp"
    for folder in (living, other, tmp_path / ".a.4194999.tmp", tmp_path / ".a.4194999.old.tmp"):
        folder.mkdir()
    files.remove_leftovers(tmp_path, "a", dead_only=True)
    assert sorted(tmp_path.iterdir()) == sorted([living, other])


def test_a_folder_that_cannot_be_made_or_written_says_why_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot make the folder .*/file: it is a file; name another --out"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(UsageError, match=r"/file/below: Not a directory; name another --report"):
        files.make_folder(tmp_path / "file/below", flag="--report")
    for place in ("/proc/x/y", "/proc"):  # the second is a folder that takes no files, even of root
        with pytest.raises(UsageError, match="cannot make the folder /proc"):
            files.make_folder(Path(place))
    files.make_folder(tmp_path / "new/deep")
    files.make_folder(tmp_path / "new/deep")
    assert list((tmp_path / "new/deep").iterdir()) == []
