"""Rules about a text, by example."""

import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from diptych.curate.rows import CANDIDATES, key_of, outcome
from diptych.curate.text.config import FilterConfig
from diptych.curate.text.filter import Filter, run
from diptych.errors import UsageError
from diptych.stage.run import Engine

EXAMPLES = {
    "A red car parked in front of a house": None,
    "Eiffel Tower at night": None,
    "AND/OR gates of a circuit": None,
    "GOLDEN RETRIEVER PUPPY IN THE GARDEN": None,
    "Map of the old town": None,
    "dog": "text_short",
    "x" * 1001: "text_long",
    "1234567 89 --- ***": "text_letters",
    "🐶🐶🐶🐶🐶🐶": "text_letters",
    "     ": "text_letters",
    "IMG_20190304_112233.jpg": "file_name",
    "My holiday picture (2).PNG": "file_name",
    "DSC_0042": "file_name",
    "Screenshot 2024-01-02 at 10.11.12 PM": "file_name",
    "https://example.org/a/b": "file_name",
    "assets/images/header": "file_name",
    "3f2504e04f8941d39a0c0305e82c3301a": "file_name",
    "red_shoe_large_1024": "file_name",
    "Click to enlarge": "boilerplate",
    "  [ FACEBOOK ]  ": "boilerplate",
    "Image may contain: 2 people, beach": "boilerplate",
    "Ein rotes Auto steht vor einem alten Haus in der Stadt": "language",
    "Une voiture rouge garée devant une vieille maison": "language",
    "Красная машина перед домом": "language",
    "停在房子前面的红色汽车": "language",
}


def stage_of(**rules) -> Filter:
    return Filter(FilterConfig(folder=Path("in"), out=Path("out"), **rules))


def test_each_text_gets_the_reason_of_the_first_rule_it_breaks():
    stage = pickle.loads(pickle.dumps(stage_of(max_words=300)))
    texts = list(EXAMPLES)
    rows = [{"key": key_of("u", text), "caption": text, "details": "{}"} for text in texts]
    batch = pa.RecordBatch.from_pylist(rows, schema=CANDIDATES)
    (out,) = stage(iter([batch]))
    assert out.schema == outcome(CANDIDATES)
    assert dict(zip(texts, out.column("reason").to_pylist(), strict=True)) == EXAMPLES
    halves = list(stage(iter([batch.slice(0, 7), batch.slice(7)])))
    assert pa.Table.from_batches(halves).equals(pa.Table.from_batches([out]))


def test_rules_can_be_turned_off_and_added_to():
    assert stage_of(file_names=False).judge()("DSC_0042 garden") is None
    assert stage_of(boilerplate=False).judge()("Click to enlarge") is None
    assert stage_of(phrases=("Our Shop!",)).judge()("our shop") == "boilerplate"
    assert stage_of(languages=()).judge()("Ein rotes Auto steht vor einem alten Haus") is None
    assert stage_of(languages=("de", "fr")).judge()("Ein rotes Auto steht vor einem alten Haus") is None
    assert stage_of(min_words=3).judge()("two words") == "text_words"
    assert stage_of(min_words=2, max_words=2).judge()("two words") is None
    assert stage_of(languages=("fr", "de")).judge()("Ein rotes Auto steht vor einem alten Haus") is None
    assert stage_of(languages=()).judge()("black/white") is None
    assert stage_of(min_words=3).judge()("红色的汽车") == "language"


def test_long_texts_made_to_stall_a_pattern_do_not():
    judge = stage_of(languages=()).judge()
    for text in ("a/" * 499 + " b", "a_" * 490 + "! x", "img " + "1 " * 490 + "z", "(a " * 330, "ab " * 333 + ".jp"):
        judge(text)


def test_a_language_that_is_not_known_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="languages xx are not among"):
        run(FilterConfig(folder=tmp_path, out=tmp_path / "o", languages=("xx",)), engine=Engine())
    with pytest.raises(UsageError, match="is not a code like"):
        FilterConfig(folder=tmp_path, out=tmp_path, languages=("English",))
