import csv
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.collect.tables import CsvTable, JsonLines, open_table
from diptych.errors import UsageError


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return path


def values(table, place=0):
    return [list(record.values.values()) if record.values else record.reason for record in table.read(place)]


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
def test_what_python_writes_is_read_back_with_any_separator(tmp_path, separator):
    rows = [
        ["a.jpg", f'a "red"{separator} dot'],
        ["b.jpg", "two\nlines, both"],
        ["ä b.jpg", "año; 'x' \t|"],
        ["c.jpg", ""],
    ]
    if separator == "\t":
        rows = [[name, text.replace("\t", " ")] for name, text in rows]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([["image", "caption"], *rows])
    table = CsvTable.open(write(tmp_path / "t", text.getvalue(), "utf-8-sig"))
    assert (table.columns, table.separator) == (("image", "caption"), separator)
    assert values(table) == rows


TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\t"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=8), separator=st.sampled_from("\t,;|"))
def test_whatever_is_in_the_texts_is_read_back(tmp_path, rows, separator):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator).writerows([["image", "caption"], *rows])
    found = values(CsvTable.open(write(tmp_path / "t", text.getvalue())))
    assert [[one.lstrip(" ") for one in row] for row in found] == [[one.lstrip(" ") for one in row] for row in rows]


def test_any_record_is_a_place_to_begin(tmp_path):
    rows = [f'{i}.jpg,"line one\nline {i}"' for i in range(50)]
    table = CsvTable.open(write(tmp_path / "t.csv", "image,caption\r\n" + "\r\n\r\n".join(rows)))
    records = list(table.read())
    assert len(records) == 50
    for start in (0, 7, 49):
        assert [record.values for record in table.read(records[start].place)] == [one.values for one in records[start:]]


@pytest.mark.parametrize("separator", ["\t", ","])
@pytest.mark.parametrize("closed", ['"', ""], ids=["closed later", "never closed"])
def test_a_quote_that_is_left_open_swallows_no_record(tmp_path, separator, closed):
    lines = [f"{i}.jpg{separator}text {i}" for i in range(20)]
    lines[5] = f'5.jpg{separator}"open'
    lines[9] = f"9.jpg{separator}{closed}text 9"
    found = values(CsvTable.open(write(tmp_path / "t", "\n".join([f"image{separator}caption", *lines]))))
    assert [row[0] for row in found] == [f"{i}.jpg" for i in range(20)]
    assert (found[5][1], found[6][1]) == ('"open', "text 6")


def test_rows_of_another_width_and_texts_that_are_no_utf8_have_reasons(tmp_path):
    table = CsvTable.open(write(tmp_path / "t.csv", b"image,caption\na.jpg,x,y\nb.jpg\n\nc.jpg,caf\xe9\nd.jpg,x,,\n"))
    assert values(table) == ["bad_row", "bad_row", "bad_text", ["d.jpg", "x"]]


def test_a_line_without_end_takes_no_memory(tmp_path):
    table = CsvTable.open(write(tmp_path / "t.csv", "image,caption\na.jpg," + "x" * (3 << 20) + "\nb.jpg,dot\n"))
    assert values(table) == ["bad_row", ["b.jpg", "dot"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.jpg,a red dot\nb.jpg,x\n", "no header, its first line names a picture"),
        ("image,caption\n".encode("utf-16"), "is UTF-16"),
        (b"\x00\x01\x02,\x03\n", "no header"),
        (b"im\xe9ge,caption\n", "is not UTF-8"),
        (b"image,image\n", "two columns of the same name"),
        (b"\n\n", "no header"),
    ],
)
def test_files_without_a_header_are_refused(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        open_table(write(tmp_path / "t.csv", content))


def test_lines_of_json_are_told_by_their_first(tmp_path):
    table = open_table(
        write(tmp_path / "t", '\ufeff{"a": 1, "b": [1, "x"]}\n\nno json\n[1]\n{"c": null}\n{"c": "\\ud83d"}\n')
    )
    assert isinstance(table, JsonLines)
    assert table.columns == ("a", "b", "c")
    assert [record.values or record.reason for record in table.read()] == [
        {"a": 1, "b": [1, "x"]}, "bad_row", "bad_row", {"c": None}, "bad_text"
    ]  # fmt: skip
