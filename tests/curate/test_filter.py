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
    rows = [{"key": key_of("u", text), "caption": text, "details": []} for text in texts]
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


NAMES = """
    Mona Lisa by Leonardo da Vinci | 2024 Toyota Corolla | Angela Merkel | Volkswagen Golf GTI | BMW X5 |
    Schönbrunn Palace | San Pedro de Atacama | La La Land movie poster | Aloe vera | Rihanna |
    Eiffel Tower, Paris | Lake Como, Italy | iPhone 15 Pro Max | Taj Mahal | Machu Picchu | Golden Gate Bridge |
    Sagrada Família | Neuschwanstein Castle | Mount Kilimanjaro | Rio de Janeiro | Buenos Aires |
    Cristiano Ronaldo | Lionel Messi | Barack Obama | Frida Kahlo | Pablo Picasso, Guernica |
    Vincent van Gogh, Starry Night | Beyoncé at Coachella | Taylor Swift | Emmanuel Macron | Tesla Model S |
    Ford Mustang 1967 | Mercedes-Benz C 300 | Porsche 911 Carrera | Boeing 747-400 | Airbus A380 | Nikon D850 |
    Canon EOS R5 | Samsung Galaxy S23 Ultra | Sony PlayStation 5 | Nintendo Switch | Canis lupus familiaris |
    Felis catus | Quercus robur | Panthera tigris | Homo sapiens | Monstera deliciosa | Star Wars logo |
    Harry Potter | Breaking Bad poster | Spaghetti carbonara | Tiramisu | Pad Thai | Crème brûlée |
    Chicken tikka masala | Sushi platter | Ludwig Mies van der Rohe | Château de Chambord |
    Yellowstone National Park | Kyoto, Japan
"""


def test_names_are_of_no_language():
    names = [name.strip() for name in NAMES.replace("\n", " ").split("|")]
    judge, strict = stage_of().judge(), stage_of(names=False).judge()
    kept = [name for name in names if judge(name) is None]
    assert (len(names), len(kept), sum(strict(name) is None for name in names)) == (60, 50, 19)
    for text in (
        "Zwei alte Autos vor einem Haus",
        "Une Voiture rouge",
        "Ein rotes Auto vor dem Haus",
        "Красная Машина Перед",
    ):
        assert judge(text) == "language", text


def test_texts_with_lost_or_doubly_read_characters_are_damaged():
    judge = stage_of(languages=()).judge()
    for text in ("The caf\ufffd was closed", "cafÃ© in Paris", "the kingâ€™s crown", "Å\x81Ã³dÅº"):
        assert judge(text) == "text_damaged", text
    for text in ("café in Paris", "SÃO PAULO", "Ã la carte", "the king’s crown", "犬の写真 dog", "Łódź castle"):
        assert judge(text) is None, text
    assert stage_of(languages=(), damaged=False).judge()("The caf\ufffd was closed") is None


def test_long_texts_made_to_stall_a_pattern_do_not():
    judge = stage_of(languages=()).judge()
    for text in ("a/" * 499 + " b", "a_" * 490 + "! x", "img " + "1 " * 490 + "z", "(a " * 330, "ab " * 333 + ".jp"):
        judge(text)


def test_a_language_that_is_not_known_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="languages xx are not among"):
        run(FilterConfig(folder=tmp_path, out=tmp_path / "o", languages=("xx",)), engine=Engine())
    with pytest.raises(UsageError, match="is not a code like"):
        FilterConfig(folder=tmp_path, out=tmp_path, languages=("English",))
