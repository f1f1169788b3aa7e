import pytest

from diptych import files


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
