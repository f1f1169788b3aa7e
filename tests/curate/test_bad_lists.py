"""Lists that users name: of queries, keys, hashes and settings, damaged or without an end."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.cli import main
from diptych.curate.rows import read_queries
from diptych.errors import ShardError, UsageError
from samples import write_samples


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"id": [0, 1]}),
        pa.table({"id": [0, 2], "text": ["a", "b"]}),
        pa.table({"id": ["x", "y"], "text": ["a", "b"]}),
        pa.table({"id": [0, 1], "text": ["a", None]}),
        pa.table({"id": [0, 1], "text": [5, 6]}),
    ],
)
def test_what_is_no_list_of_queries_is_one_line(table, tmp_path):
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(UsageError, match="q"):
        read_queries(tmp_path / "q.parquet")


def test_a_damaged_list_of_queries_is_one_line(tmp_path):
    for data in (b"", b"x" * 1000):
        (tmp_path / "q.parquet").write_bytes(data)
        with pytest.raises(ShardError, match="is damaged"):
            read_queries(tmp_path / "q.parquet")


@pytest.mark.parametrize("command", ["lists", "corpus", "pageviews"])
def test_a_pipe_is_not_waited_for_and_a_line_has_an_end(command, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "long.txt").write_bytes(b"x" * (2 << 20) + b"\ncircle\nen Circle 12 0\n")
    for name in ("pipe", "long"):
        arguments = ["queries", f"--{command}", tmp_path / f"{name}.txt", "--out", tmp_path / name, "--processes", 0]
        with pytest.raises(SystemExit):
            main(["curate", *map(str, arguments)])
        printed = capsys.readouterr()
        if name == "pipe":
            assert "pipe.txt is a pipe, socket or device" in printed.err
        elif command == "lists":
            assert "long.txt has a line of more than 1,048,576 bytes" in printed.err
        else:
            assert not printed.err


def test_keys_that_are_not_text_are_one_line(tmp_path, capsys):
    write_samples(tmp_path / "data", count=4)
    (tmp_path / "keys.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SystemExit) as ended:
        main(["curate", "delete", str(tmp_path / "data"), "--from", str(tmp_path / "keys.txt")])
    assert ended.value.code == 2
    assert "keys.txt is not UTF-8" in capsys.readouterr().err
