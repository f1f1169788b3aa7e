import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from diptych import files
from diptych.errors import RunLockedError, UsageError


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


def test_a_held_folder_is_refused_by_the_name_of_its_holder_who_keeps_it(tmp_path):
    script = f"""
from pathlib import Path
from diptych.files import hold_folder
with hold_folder(Path({str(tmp_path)!r})):
    input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as holder:
        try:
            while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text().endswith("\n"):
                assert holder.poll() is None
            for _ in range(2):  # who is refused must not erase the name
                with pytest.raises(RunLockedError, match=rf"in use by another process .process {holder.pid} on "):
                    files.hold_folder(tmp_path).__enter__()
        finally:
            holder.kill()
    with files.hold_folder(tmp_path):  # a lock ends with its process
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_said_instead_of_a_lock_that_outlives_its_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(sys.modules["fcntl"], "flock", refuse)
    with pytest.raises(OSError, match="not implemented"), files.hold_folder(tmp_path):
        pass
    assert filelock.has_fcntl


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DIPTYCH_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}, "/mine/index"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/diptych/index"),
        ({"HOME": "/home/me"}, "/home/me/.cache/diptych/index"),
    ],
)
def test_everything_that_can_be_made_again_lies_in_one_cache(monkeypatch, environment, folder):
    for name in ("DIPTYCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert files.cache_folder("index") == Path(folder)
