import base64
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.embed.bulk.inputs import open_inputs
from diptych.embed.bulk.job import iter_contiguous_parts, plan_parts
from diptych.embed.sources import Source, fetch
from diptych.errors import NotFoundError, PictureError, UsageError
from samples import draw, encode, write_samples, write_tar

RED, BLUE = encode(draw("red", "dot")), encode(draw("blue", "ring"))


def ids(source: Source) -> list[str]:
    return [row.id for row in source.read(0, source.rows)]


def contents(source: Source, start: int = 0, stop: int | None = None) -> list[bytes | str]:
    """What the rows hold, or the reason why they hold nothing."""

    def one(row) -> bytes | str:
        try:
            return fetch(row)
        except PictureError as error:
            return error.reason

    return [one(row) for row in source.read(start, source.rows if stop is None else stop)]


def write_tree(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(RED)
    return folder


def test_folders_are_walked_in_a_fixed_order_without_what_is_hidden(tmp_path):
    write_tree(tmp_path, "b/x.JPG", "a.png", "b/c/y.tiff", ".hidden/z.jpg", "b/._x.jpg", "readme", "b/list.csv")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (source,) = open_inputs([str(tmp_path)])
    assert ids(source) == ["a.png", "b/c/y.tiff", "b/x.JPG"]
    assert source.passed_over == {"": 1, ".csv": 1}
    assert contents(source) == [RED, RED, RED]


def test_globs_begin_where_their_first_sign_is(tmp_path):
    write_tree(tmp_path, "set/a/1.jpg", "set/b/2.jpg", "set/b/3.png")
    (source,) = open_inputs([str(tmp_path / "set/*/*.jpg")])
    assert ids(source) == ["a/1.jpg", "b/2.jpg"]
    (source,) = open_inputs([str(tmp_path / "**/*.png")])
    assert ids(source) == ["set/b/3.png"]
    with pytest.raises(NotFoundError, match="nothing matches"):
        open_inputs([str(tmp_path / "*.gif")])


def test_pictures_that_a_shell_has_spelled_out_are_one_source(tmp_path):
    write_tree(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    named = [str(tmp_path / name) for name in ("a/1.jpg", "b/1.jpg", "a/2.jpg")]
    (source,) = open_inputs(named)
    assert (source.name, ids(source)) == (str(tmp_path), ["a/1.jpg", "b/1.jpg", "a/2.jpg"])
    with pytest.raises(UsageError, match="named more than once"):
        open_inputs([*named, named[0]])


def test_names_that_are_no_text_are_written_out(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(RED)
    (source,) = open_inputs([str(tmp_path)])
    assert ids(source) == ["caf\\xe9.jpg"]
    assert contents(source) == [RED]


def test_columns_hold_pictures_paths_or_captions(tmp_path):
    write_tree(tmp_path, "pics/1.jpg")
    table = pa.table(
        {
            "bytes": [RED, None, BLUE],
            "hf": [{"bytes": RED, "path": "x"}, {"bytes": None, "path": "pics/1.jpg"}, None],
            "path": ["pics/1.jpg", "pics/gone.jpg", None],
            "caption": ["a", "pics/1.jpg", ""],
            "number": [1, 2, 3],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")

    def column(name: str, kind=None) -> Source:
        (source,) = open_inputs([f"{tmp_path}/t.parquet:{name}"], kind)
        return source

    assert contents(column("bytes")) == [RED, "null", BLUE]
    assert contents(column("hf")) == [RED, RED, "null"]
    assert contents(column("path")) == [RED, "missing", "null"]
    assert (column("caption").kind, contents(column("caption"))) == ("text", ["a", "pics/1.jpg", "empty"])
    assert contents(column("path", "text")) == ["pics/1.jpg", "pics/gone.jpg", "null"]
    assert column("caption", "image").kind == "image"
    assert ids(column("bytes")) == ["0", "1", "2"]
    with pytest.raises(UsageError, match="is int64"):
        column("number")
    with pytest.raises(UsageError, match="holds pictures"):
        column("bytes", "text")
    with pytest.raises(UsageError, match=r"no column 'capton'; it has bytes, hf, path, caption, number"):
        column("capton")
    with pytest.raises(UsageError, match="name the one to embed"):
        open_inputs([str(tmp_path / "t.parquet")])


def test_columns_of_any_string_or_bytes_are_decoded(tmp_path):
    write_tree(tmp_path, "pics/1.jpg")
    paths, captions = ["pics/1.jpg", None], ["a cat", "a dog"]
    coded = [base64.b64encode(RED).decode(), f"data:image/jpeg;base64,{base64.b64encode(BLUE).decode()}", None, "no"]
    columns = {
        "a:b": (pa.array(paths), [RED, "null"]),
        "a.b": (pa.array([RED, None], pa.binary_view()), [RED, "null"]),
        "a": (pa.array([{"b": 1}, {"b": 2}]), None),
        "view": (pa.array(captions, pa.string_view()), captions),
        "category": (pa.array(captions).dictionary_encode(), captions),
        "coded paths": (pa.array(paths, pa.large_string()).dictionary_encode(), [RED, "null"]),
        "fixed": (pa.array([RED, RED], pa.binary(len(RED))), [RED, RED]),
        "numbers": (pa.array([list(RED), None], pa.list_(pa.uint8())), [RED, "null"]),
        "captions": (pa.array([["a", "b"], ["c"]]), None),
    }
    pq.write_table(pa.table({name: column for name, (column, _) in columns.items()}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"64": coded, "b:64": coded}), tmp_path / "c.parquet")
    for name, (_, wanted) in columns.items():
        if wanted is None:
            with pytest.raises(UsageError, match="name one of bytes"):
                open_inputs([f"{tmp_path}/t.parquet:{name}"])
            continue
        (source,) = open_inputs([f"{tmp_path}/t.parquet:{name}"])
        assert contents(source) == wanted, name
    for given in (f"{tmp_path}/c.parquet:64", f"{tmp_path}/c*.parquet:b:64", f"{tmp_path}/c.parquet:b:64"):
        (source,) = open_inputs([given])
        assert (source.kind, contents(source)) == ("image", [RED, BLUE, "null", "bad_base64"])
    (source,) = open_inputs([f"{tmp_path}/c.parquet:64"], "text")
    assert contents(source)[0] == coded[0]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["t", "t"]), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="has 2 columns 't'"):
        open_inputs([f"{tmp_path}/t.parquet:t"])


@pytest.mark.parametrize(("start", "stop"), [(0, 1000), (0, 7), (95, 205), (399, 400), (640, 1000), (123, 124)])
def test_any_range_of_a_column_is_read_whatever_its_row_groups(tmp_path, start, stop):
    texts = [f"text {i}" for i in range(1000)]
    pq.write_table(pa.table({"t": texts}), tmp_path / "t.parquet", row_group_size=100)
    (source,) = open_inputs([f"{tmp_path}/t.parquet:t"])
    assert contents(source, start, stop) == texts[start:stop]
    assert [row.id for row in source.read(start, stop)] == [str(i) for i in range(start, stop)]


def test_tars_of_pictures_need_no_captions(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar", [("x/1.jpg", RED), ("x/1.png", b"second"), ("y.txt", b"only text"), ("2.jpg", BLUE)]
    )
    (source,) = open_inputs([str(tar)])
    assert (ids(source), contents(source)) == (["x/1", "2"], [RED, BLUE])
    assert source.lost == (("x/1", "duplicate_key"),)
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(NotFoundError, match="nothing to embed"):
        open_inputs([str(tar)])


def test_a_shard_that_was_changed_under_its_index_gives_no_feature(tmp_path):
    data = write_samples(tmp_path / "shards", 4)
    (source,) = open_inputs([str(data)])
    (data / "00000.tar").write_bytes((data / "00000.tar").read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\x00", 1))
    assert [content for content in contents(source) if isinstance(content, str)] == ["changed"]


def test_folders_with_other_content_say_what_they_lack(tmp_path):
    write_tree(tmp_path, "docs/readme.md")
    with pytest.raises(NotFoundError, match=r"no pictures, .tar or .parquet in .*\(other files: .md 1\)"):
        open_inputs([str(tmp_path / "docs")])
    with pytest.raises(NotFoundError, match="no such input"):
        open_inputs([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="is a URL"):
        open_inputs(["s3://bucket/pictures"])
    with pytest.raises(UsageError, match="no input was named"):
        open_inputs([])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        open_inputs([f"{tmp_path}/broken.parquet:x"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(NotFoundError, match=r"nothing to embed in .*empty.txt \(no rows\)"):
        open_inputs([str(tmp_path / "empty.txt")])
    with pytest.raises(UsageError, match="no input was named"):
        open_inputs([""])
    with pytest.raises(UsageError, match="has no columns"):
        open_inputs([f"{tmp_path}/empty.txt:text"])


def test_fingerprints_follow_what_the_inputs_hold(tmp_path):
    write_tree(tmp_path, "a.jpg", "b.jpg")
    (before,) = open_inputs([str(tmp_path)])
    (again,) = open_inputs([str(tmp_path)])
    assert again.fingerprint == before.fingerprint
    (tmp_path / "b.jpg").write_bytes(BLUE + b"0")
    (after,) = open_inputs([str(tmp_path)])
    assert after.fingerprint != before.fingerprint


def test_parts_cover_every_row_once_and_neighbours_are_read_together(tmp_path):
    for name, lines in (("a", 25), ("b", 10), ("c", 1)):
        (tmp_path / f"{name}.txt").write_text("x\n" * lines)
    sources = open_inputs([str(tmp_path / "*.txt")])
    parts = plan_parts(sources, 10)
    assert [(part.source, part.start, part.stop) for part in parts] == [
        *((0, 0, 10), (0, 10, 20), (0, 20, 25)),
        *((1, 0, 10), (2, 0, 1)),
    ]
    assert [part.name for part in parts] == ["00000", "00001", "00002", "00003", "00004"]
    todo = [parts[i] for i in (0, 2, 3, 4)]
    assert list(iter_contiguous_parts(todo)) == [[part] for part in todo]
    assert list(iter_contiguous_parts(parts)) == [parts[:3], [parts[3]], [parts[4]]]
    assert list(iter_contiguous_parts(parts, 2)) == [parts[:2], [parts[2]], [parts[3]], [parts[4]]]


def test_a_named_file_of_no_known_kind_is_refused_with_the_kinds_that_are(tmp_path):
    write_tree(tmp_path, "a.jpg", "shapes.toml", "table.csv", "bare")
    for name in ("shapes.toml", "table.csv", "bare"):
        with pytest.raises(UsageError, match=rf"{name} is of no kind .* \.png .*\.tar.*\.parquet:COLUMN.*\.txt"):
            open_inputs([str(tmp_path / "a.jpg"), str(tmp_path / name)])


def test_a_glob_passes_over_what_is_of_no_known_kind_and_counts_it(tmp_path):
    write_tree(tmp_path, "p/a.jpg", "p/b.md", "q/c.md")
    (tmp_path / "q/d.txt").write_text("a text")
    (pictures,) = open_inputs([str(tmp_path / "p/*")])
    (texts,) = open_inputs([str(tmp_path / "q/*")])
    assert (ids(pictures), contents(texts)) == (["a.jpg"], ["a text"])
    assert pictures.passed_over == texts.passed_over == {".md": 1}
    with pytest.raises(UsageError, match=r"matches .*b.md, and no file that can be embedded; known are pictures"):
        open_inputs([str(tmp_path / "*/b*")])


def test_a_kind_that_an_input_is_not_of_is_an_error(tmp_path):
    write_tree(tmp_path, "pics/a.jpg")
    (tmp_path / "t.txt").write_text("a text\n")
    for pictures in ("pics", "pics/*.jpg", "pics/a.jpg"):
        with pytest.raises(UsageError, match="holds pictures; leave --kind text out, or name inputs that hold texts"):
            open_inputs([str(tmp_path / pictures), str(tmp_path / "t.txt")], "text")
        assert [source.kind for source in open_inputs([str(tmp_path / pictures)], "image")] == ["image"]
    with pytest.raises(UsageError, match=r"t.txt holds texts; leave --kind image out, or name inputs that hold pictu"):
        open_inputs([str(tmp_path / "pics"), str(tmp_path / "t.txt")], "image")
    assert [source.kind for source in open_inputs([str(tmp_path / "t.txt")], "text")] == ["text"]


def test_shards_without_captions_say_so_when_these_are_asked_for(tmp_path):
    write_tar(tmp_path / "s.tar", [("1.jpg", RED), ("1.cls", b"3"), ("2.jpg", BLUE), ("2.cls", b"4")])
    with pytest.raises(NotFoundError, match=r"nothing to embed in .* \(no_caption 2; without --kind text the pict"):
        open_inputs([str(tmp_path)], "text")
    (source,) = open_inputs([str(tmp_path)])
    assert contents(source) == [RED, BLUE]


def test_texts_of_a_table_that_are_not_utf_8_are_counted(tmp_path):
    offsets = pa.py_buffer(np.array([0, 3, 6, 9], np.int32).tobytes())
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"one\xff\xfe\xfdtwo")])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (source,) = open_inputs([f"{tmp_path / 'a.parquet'}:text"], "text")
    assert [(row.content, row.reason) for row in source.read(0, 3)] == [("one", ""), (None, "bad_text"), ("two", "")]


def test_a_file_of_utf_16_is_refused_and_not_read_as_nul_laden_halves(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n", encoding="utf-16")
    with pytest.raises(UsageError, match="is UTF-16; save it as UTF-8"):
        open_inputs([str(tmp_path / "a.txt")])


def test_paths_of_a_table_stay_in_its_folder_and_urls_are_not_fetched(tmp_path):
    (tmp_path / "table").mkdir()
    paths = ["a.jpg", "../b.jpg", "https://host/c.jpg", "sub/../d.jpg"]
    pq.write_table(pa.table({"image": paths}), tmp_path / "table/a.parquet")
    (source,) = open_inputs([f"{tmp_path / 'table/a.parquet'}:image"])
    assert [row.reason for row in source.read(0, 4)] == ["", "outside_folder", "url", ""]


def test_ranges_are_spelled_out_and_what_they_lack_is_named(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [("a.jpg", RED)])
    pq.write_table(pa.table({"caption": ["a", "b"]}), tmp_path / "t0.parquet")
    named = open_inputs([f"{tmp_path}/{{0..1}}.tar"])
    assert [source.name for source in named] == [f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"]
    assert [source.rows for source in open_inputs([f"{tmp_path}/t{{0..0}}.parquet:caption"])] == [2]
    with pytest.raises(NotFoundError, match=r"no such input: .*2\.tar"):
        open_inputs([f"{tmp_path}/{{0..2}}.tar"])


@pytest.mark.parametrize("lines", ["a.jpg\n\nb/c.PNG\n", "https://a.example/1?x=y\nhttp://b.example/c.jpg\n"])
def test_a_list_of_pictures_is_not_taken_for_captions(tmp_path, lines):
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(UsageError, match=r"list\.txt lists pictures, like .*--kind text"):
        open_inputs([str(tmp_path / "list.txt")])
    assert open_inputs([str(tmp_path / "list.txt")], "text")[0].rows == lines.count("\n")
    (tmp_path / "list.txt").write_text(f"{lines}a dog\n")
    assert open_inputs([str(tmp_path / "list.txt")])[0].kind == "text"
