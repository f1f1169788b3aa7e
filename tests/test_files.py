import contextlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    (tmp_path / ".a.json.0123456789abcdef.tmp").write_text("")
    (tmp_path / "step_1").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x").touch()
    (tmp_path / ".notes.tmp").touch()
    (tmp_path / ".link.123.tmp").symlink_to("elsewhere")
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".link.123.tmp", ".notes.tmp", "elsewhere", "step_1"]
    assert (tmp_path / "elsewhere/x").exists()


@pytest.mark.parametrize("killed_after", range(6))
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new(tmp_path, monkeypatch, killed_after):
    def fill(content):
        with files.atomic_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text(content)

    fill("old")
    steps = 0
    real_replace, real_rmtree = os.replace, files.shutil.rmtree

    def killable(action):
        def act(*given, **options):
            nonlocal steps
            if steps >= killed_after:
                raise SystemExit  # no clean-up code may do more than a kill would let it
            steps += 1
            return action(*given, **options)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killable(real_replace))
        patch.setattr(files.shutil, "rmtree", killable(real_rmtree))
        with contextlib.suppress(SystemExit):
            fill("new")
    files.remove_leftovers(tmp_path, "model")
    assert (tmp_path / "model/weights").read_text() in ("old", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_two_writers_with_one_process_number_do_not_meet(tmp_path):
    def write(number):
        for _ in range(50):
            files.write_json(tmp_path / "a.json", number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert files.read_json(tmp_path / "a.json") in range(8)


def test_a_name_as_long_as_the_disk_allows_can_be_written(tmp_path):
    files.write_bytes(tmp_path / ("a" * 255), b"x")
    assert (tmp_path / ("a" * 255)).read_bytes() == b"x"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b"\xff\xfe{", b'{"a": ' + b"9" * 5000 + b"}", b"\0" * 10, '"\\x"']
)
def test_what_is_no_json_is_a_value_error_whatever_is_wrong_with_it(data):
    with pytest.raises(ValueError):  # noqa: PT011
        files.parse_json(data)


def test_json_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4, 5]")
    with pytest.raises(ValueError, match="more than 10 bytes"):
        files.read_json(tmp_path / "a.json")


def test_a_name_that_is_not_utf_8_can_be_written_as_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"path": "a\udcff", "text": "ä"})
    assert files.read_json(tmp_path / "a.json") == {"path": "a\udcff", "text": "ä"}


def test_leftovers_of_a_living_writer_and_of_other_names_stay_where_writers_share_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    living, other = tmp_path / ".a.0123456789abcdef.tmp", tmp_path / ".b.4194999.tmp"
    for folder in (living, other, tmp_path / ".a.4194999.tmp", tmp_path / ".a.4194999.old.tmp"):
        folder.mkdir()
        if folder != living:
            os.utime(folder, (0, 0))
    files.remove_leftovers(tmp_path, "a", older_than=3600.0)
    assert sorted(tmp_path.iterdir()) == sorted([living, other, tmp_path / "a"])


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


def test_json_that_is_nested_deeper_than_whoever_walks_it_bears_is_no_json():
    nested = "[" * 100 + "]" * 100
    assert len(files.parse_json(nested)) == 1
    assert len(files.parse_json(str([[]] * 1000))) == 1000
    for text in (f"[{nested}]", f'{{"a": {nested}}}'.encode(), "[" * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            files.parse_json(text)


def test_globs_go_around_no_circle_of_links(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("one", "two"):
        (tmp_path / "a" / name).symlink_to(tmp_path, target_is_directory=True)
    for name in ("a/x.jpg", "y.jpg", ".hidden/z.jpg", "a/.w.jpg"):
        (tmp_path / name).touch()
    expected = [f"{tmp_path}/a/x.jpg", f"{tmp_path}/y.jpg"]
    assert files.expand_glob(f"{tmp_path}/**/*.jpg") == expected
    assert files.expand_glob(f"{tmp_path}/**/[xy]*") == files.expand_glob(f"{tmp_path}/**/**/*.jpg") == expected
    assert files.expand_glob(f"{tmp_path}/**") == expected
    monkeypatch.chdir(tmp_path)
    assert files.expand_glob("**/*.jpg") == ["a/x.jpg", "y.jpg"]
    assert files.expand_glob("*/one/*.jpg") == ["a/one/y.jpg"]


def test_names_stand_for_ranges_and_globs_but_for_themselves_if_they_are_there(tmp_path):
    for name in ("a0.tar", "a1.tar", "b{0..9}.tar", "c[1].tar"):
        (tmp_path / name).touch()

    def spell(name: str) -> list[str]:
        return [one.removeprefix(f"{tmp_path}/") for one in files.spell_out(f"{tmp_path}/{name}")]

    assert spell("a{0..2}.tar") == ["a0.tar", "a1.tar", "a2.tar"]
    assert spell("[ab]*.tar") == ["a0.tar", "a1.tar", "b{0..9}.tar"]
    assert spell("b{0..9}.tar") == ["b{0..9}.tar"]
    assert spell("c[1].tar") == ["c[1].tar"]


def test_what_never_ends_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        for read in (files.read_bytes, files.read_text, files.read_json, files.require_file):
            with pytest.raises(UsageError, match="is a pipe, socket or device"):
                read(tmp_path / name)
    files.require_file(tmp_path / "nowhere")
    files.require_file(tmp_path)


def test_a_file_is_read_whole_only_if_it_is_small(tmp_path):
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(UsageError, match="has more than 67,108,864 bytes"):
        files.read_text(tmp_path / "holes")
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").touch()
    assert (files.read_text(tmp_path / "marked"), files.read_text(tmp_path / "empty")) == ("a", "")
    with pytest.raises(UsageError, match="latin is not UTF-8"):
        files.read_text(tmp_path / "latin")
    assert files.read_bytes(tmp_path / "latin", 4) == b"caf\xe9"
    with pytest.raises(UsageError, match="more than 3 bytes"):
        files.read_bytes(tmp_path / "latin", 3)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_a_line_without_an_end_is_none(monkeypatch, block):
    monkeypatch.setattr(files, "MAX_LINE", 20)
    monkeypatch.setattr(files, "_BLOCK", block)
    data = b"a\n\n" + b"x" * 50 + b"\nb\r\n" + b"y" * 20 + b"\nlast"
    assert list(files.iter_lines(io.BytesIO(data))) == [b"a\n", b"\n", None, b"b\r\n", None, b"last"]
    assert list(files.iter_lines(io.BytesIO(b"z" * 99))) == [None]
    assert list(files.iter_lines(io.BytesIO(b""))) == []
