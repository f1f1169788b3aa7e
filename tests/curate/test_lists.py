"""Sources of queries that others have listed: page views, WordNet, published lists."""

import gzip
import io
import tarfile
import zipfile

import pytest

from diptych.curate.queries.lists import clean_title, count_views, read_list, read_wordnet
from diptych.errors import NotFoundError, UsageError

NOUNS = b"".join(
    [
        b"  1 This software and database is being provided to you  \n",
        b"00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 | that which is perceived  \n",
        b"02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 | a member  \n",
        b"07697537 13 n 03 hot_dog 1 hotdog 1 frank 0 000 | a frankfurter  \n",
    ]
)
ADJECTIVES = b"00014490 00 s 02 galore(ip) 0 abounding 0 000 | existing in abundance  \n"
FIRST_WORDS = ["galore", "entity", "dog", "hot dog"]


def views(tmp_path, files: list[bytes], least: int = 1, memory: int = 2) -> list[tuple[str, int]]:
    places = []
    for i, content in enumerate(files):
        places.append(str(tmp_path / f"pageviews-{i}.gz"))
        (tmp_path / f"pageviews-{i}.gz").write_bytes(gzip.compress(content))
    return list(count_views(places, tmp_path / "scratch", project="en", least_a_file=least, memory=memory))


def test_views_add_up_over_sites_and_files(tmp_path):
    first = b"en Hot_dog 3 0\nen.m Hot_dog 4 0\nde Hot_dog 9 0\nen Special:Search 50 0\nen - 8 0\nbroken\n"
    second = b"en.wikipedia Hot_dog 123 desktop 5 A2B3\nen %22Heroes%22 2 0\nen Star_Trek:_Picard x 0\nen A:_B 1 0\n"
    assert views(tmp_path, [first, second]) == [('"Heroes"', 2), ("A: B", 1), ("Hot dog", 12)]


@pytest.mark.parametrize("memory", [1, 100])
def test_few_views_in_one_file_can_be_left_out(tmp_path, memory):
    files = [b"en A 3 0\nen B 2 0\nen.m B 1 0\n", b"en A 2 0\nen C 9 0\n"]
    assert views(tmp_path, files, least=3, memory=memory) == [("A", 3), ("B", 3), ("C", 9)]


def test_a_title_loses_what_tells_articles_apart():
    assert clean_title("Mercury (planet)") == "Mercury"
    assert clean_title("(What's the Story) Morning Glory?") == "(What's the Story) Morning Glory?"
    assert clean_title("(x)") == "(x)"


def make_wordnet(tmp_path, kind: str) -> str:
    members = {"dict/data.noun": NOUNS, "dict/data.adj": ADJECTIVES, "dict/index.noun": b"dog n 1\n"}
    path = tmp_path / f"wordnet{kind}"
    if kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    elif kind == ".tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        (path / "dict").mkdir(parents=True)
        for name, content in members.items():
            (path / name).write_bytes(content)
    return str(path)


@pytest.mark.parametrize("kind", ["", ".zip", ".tar.gz"])
def test_the_first_word_of_each_synset(tmp_path, kind):
    assert sorted(read_wordnet(make_wordnet(tmp_path, kind))) == sorted(FIRST_WORDS)


def test_what_is_not_wordnet_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match=r"data\.noun"):
        list(read_wordnet(str(tmp_path)))
    (tmp_path / "a.zip").write_bytes(b"PK no")
    (tmp_path / "a.tar.gz").write_bytes(b"no")
    for name in ("a.zip", "a.tar.gz"):
        with pytest.raises(UsageError, match="damaged archive"):
            list(read_wordnet(str(tmp_path / name)))


def test_lists_are_lines_first_columns_or_json(tmp_path):
    (tmp_path / "a.txt").write_text("dog\n\n hot dog \r\n")
    (tmp_path / "a.tsv").write_text("dog\tanimal\t5\ncat\tanimal\t6\n")
    (tmp_path / "a.json").write_text('["0", "St. Louis"]')
    (tmp_path / "b.json").write_text('{"dog": 1}')
    assert list(read_list(str(tmp_path / "a.txt"))) == ["dog", "", "hot dog"]
    assert list(read_list(str(tmp_path / "a.tsv"))) == ["dog", "cat"]
    assert list(read_list(str(tmp_path / "a.json"))) == ["0", "St. Louis"]
    with pytest.raises(UsageError, match="JSON list of strings"):
        list(read_list(str(tmp_path / "b.json")))


@pytest.mark.parametrize("content", [b'{"items": [{"article": "Dog", "views": 5}]}', b"de Hund 3 0\n", b""])
def test_a_file_without_views_of_the_project_is_refused(tmp_path, content):
    with pytest.raises(UsageError, match=r"pageviews-1.gz holds no views of articles of the project en"):
        views(tmp_path, [b"en Dog 3 0\n", content])
