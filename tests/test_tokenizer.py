import dataclasses
import gzip
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych import tokens
from diptych.bpe import build_pairs, merge_long, merge_short, spell_tokens
from diptych.tokenizer import _ASCII_PIECES, _PIECES, ChunkCache, Tokenizer, clean, clean_quickly, train_bpe
from reference import bpe as slow

FIXTURE = Path(__file__).parent / "fixtures" / "tokenizer_open_clip.json.gz"
CAPTIONS = ["a cat on a mat", "two cats", "the cat sat on the mat", "a mat, a cat & a hat", "naïve café 12"]

# Building blocks that meet the rules at their edges; hypothesis joins them with arbitrary text.
EDGES = [
    "'s", "'\u017f", "&amp;amp;lt;", "&eacute", "&#x1F600;", "\x1b[31m", "\x00", "\r\n", "\u2028", "\xa0",
    "\u03a3", "\u0130", "<start_of_text>", "<END_OF_TEXT>", "12", "...", "\xe9", "e\u0301", "\u65e5\u672c",
    "\U0001f642\u200d", "a" * 60, "\xe2\u20ac\u2122", " ", "\u0345",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(EDGES), st.text(max_size=12)), max_size=8).map("".join)


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_bpe(CAPTIONS, vocab_size=530, context_length=8)


@pytest.fixture(scope="module")
def open_clip() -> dict:
    return json.loads(gzip.decompress(FIXTURE.read_bytes()))


def test_ids_equal_those_of_open_clip_on_awkward_strings(open_clip):
    tokenizer = Tokenizer.clip(special_tokens="parse")
    assert len(open_clip["texts"]) >= 3000
    for text, ids in zip(open_clip["texts"], open_clip["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text


def test_rows_of_a_batch_are_start_ids_end_and_zeros(open_clip):
    rows = Tokenizer.clip(special_tokens="parse")(open_clip["texts"]).tolist()
    for row, ids in zip(rows, open_clip["ids"], strict=True):
        assert row == [49406, *ids[:75], 49407] + [0] * (75 - len(ids))


def test_vocabulary_is_that_of_the_released_models(clip):
    assert (clip.vocab_size, clip.start_token_id, clip.end_token_id) == (49408, 49406, 49407)
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert (clip.encode("!%"), clip.encode("!"), clip.encode("!!")) == ([0, 260], [256], [748])


def test_every_merge_has_a_higher_id_than_its_parts(clip):
    assert all(new > max(pair) for pair, new in build_pairs(clip.merges).items())


def test_the_one_character_that_no_rule_matches_is_left_out(clip):
    # Case folding makes U+0345, a combining mark, both a letter and none.
    for text in ["a\u0345", "a\u0345 b", "\u0345a", "1\u0345", "\u0345", "a\u0345!", "\u04e8\u0345"]:
        assert clip.encode(text) == slow.encode(text, clip.merges), text


@settings(max_examples=300, deadline=None)
@given(texts, st.sampled_from(["escape", "parse"]))
def test_fast_ids_equal_those_of_the_slow_twin(text, special_tokens):
    tokenizer = Tokenizer.clip(special_tokens=special_tokens)
    assert tokenizer.encode(text) == slow.encode(text, tokenizer.merges, special_tokens)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x7F), max_size=40))
def test_quick_cleaning_equals_the_full_rules_up_to_spaces(text):
    assert clean_quickly(text).split() == clean(text).split()


def test_quick_cleaning_holds_for_every_pair_of_ascii_characters():
    for first in map(chr, range(128)):
        text = " ".join(f"{first}{second}" for second in map(chr, range(32, 127)))
        assert clean_quickly(text).split() == clean(text).split()


SIGNS = ["'", "<", ">", "_", ".", "\x00", "\x1f", "\x7f"]


def test_pieces_of_ascii_equal_the_full_rules_for_all_short_chunks():
    for mode, letters in itertools.product(["escape", "parse"], ["astv1", "relmd"]):
        fast, full = _ASCII_PIECES[mode].findall, _PIECES[mode].findall
        for letters_and_signs in itertools.product([*letters, *SIGNS], repeat=4):
            chunk = "".join(letters_and_signs)
            assert fast(chunk) == full(chunk), chunk
        for chunk in map("".join, itertools.product(map(chr, range(128)), repeat=2)):
            if len(chunk.split()) == 1 and len(chunk) == len(chunk.strip()) and chunk == chunk.lower():
                assert fast(chunk) == full(chunk), chunk


ascii_chunks = st.lists(
    st.one_of(
        st.sampled_from(["<start_of_text>", "<end_of_text>", "<end_of_tex", "'re", "'ll", "''s", "s's't", "o'clock's"]),
        st.text(st.characters(max_codepoint=0x7F), max_size=6),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=500, deadline=None)
@given(ascii_chunks, st.sampled_from(["escape", "parse"]))
def test_the_quick_way_of_ascii_gives_the_ids_of_the_full_rules(text, special_tokens):
    tokenizer = Tokenizer.clip(special_tokens=special_tokens)
    for chunk in clean(text).split():
        assert ChunkCache({}, special_tokens)._find_pieces(chunk) == _PIECES[special_tokens].findall(chunk)
    assert tokenizer.encode(text) == slow.encode(text, tokenizer.merges, special_tokens)


def test_every_word_that_is_known_without_merging_is_what_merging_gives(clip):
    cache = ChunkCache(pairs := build_pairs(clip.merges), "escape")
    known = dataclasses.replace(clip)._chunks
    assert len(known) > 30_000
    for word, ids in known.items():
        assert merge_long(word.encode(), pairs) == np.frombuffer(ids, dtype=np.int32).tolist()
        assert cache[word] == ids
    single = {spelling[:-1] for spelling in spell_tokens(pairs)[512:] if spelling.endswith(b" ")}
    assert {word.decode() for word in single if word.isascii() and word.isalpha()} == known.keys()


def test_a_vocabulary_of_ones_own_starts_with_nothing_known(small):
    # Its merges may be of any origin: only of the stock vocabulary a test says that each token is its own encoding.
    assert len(dataclasses.replace(small)._chunks) == 0


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aabcst"), min_size=1, max_size=70), st.integers(0, 40))
def test_both_ways_of_merging_give_the_same(word, seed):
    merges = train_bpe([word, "abcab" * 3, "ststst", "aaaa"], vocab_size=514 + seed % 8).merges
    for pairs in (build_pairs(merges), CLIP_PAIRS):
        assert merge_short(word.encode(), pairs) == merge_long(word.encode(), pairs)


CLIP_PAIRS = build_pairs(Tokenizer.clip().merges)


@settings(max_examples=100, deadline=None)
@given(st.lists(texts, max_size=6))
def test_a_batch_equals_its_texts_one_by_one(batch):
    tokenizer = Tokenizer.clip()
    rows = tokenizer(batch)
    assert rows.shape == (len(batch), 77)
    for row, text in zip(rows, batch, strict=True):
        assert torch.equal(row, tokenizer(text)[0])


def test_rows_are_int64_on_an_empty_list_too(clip):
    assert clip([]).shape == (0, 77)
    assert clip([]).dtype == torch.int64


def test_an_empty_text_is_a_start_and_an_end(clip):
    assert clip.encode("") == clip.encode(" \t\n ") == []
    assert clip("", context_length=4).tolist() == [[49406, 49407, 0, 0]]


def test_a_text_that_is_too_long_keeps_its_beginning_and_the_end_token(clip):
    batch = clip.encode_batch(["cat " * 75, "cat " * 76, "dog", "cat " * 500])
    assert batch.truncated == 2
    assert batch.lengths.tolist() == [77, 77, 3, 77]
    rows = batch.padded(77)
    assert rows[:, 76].tolist() == [49407, 49407, 0, 49407]
    assert rows[1].tolist() == [49406, *[2368] * 75, 49407]
    assert clip("cat " * 9, context_length=2).tolist() == [[49406, 49407]]


def test_a_text_that_is_too_long_is_an_error_on_request(clip):
    with pytest.raises(ValueError, match=r"text 1 has 102 tokens.*context_length=77.*'cat cat.*truncate=True"):
        clip(["a dog", "cat " * 100], truncate=False)
    assert clip(["cat " * 75], truncate=False).shape == (1, 77)


def test_a_ragged_batch_refuses_rows_that_are_too_short(clip):
    with pytest.raises(ValueError, match="5 tokens, more than context_length=4"):
        clip.encode_batch(["a black cat"]).padded(4)


def test_ragged_ids_are_the_rows_without_their_zeros(clip):
    batch = clip.encode_batch(["a cat", "", "two cats!"])
    assert batch.offsets.tolist() == [0, 4, 6, 11]
    assert batch.ids.dtype == np.int32
    assert batch.ids[6:11].tolist() == [49406, *clip.encode("two cats!"), 49407]


@pytest.mark.parametrize("special", ["<start_of_text>", "<END_of_text>", "<|startoftext|>", "<|endoftext|>"])
def test_a_special_token_in_a_caption_is_ordinary_text(clip, special):
    ids = clip.encode(f"a {special}{special} cat")
    assert len(ids) > 6
    assert max(ids) < clip.start_token_id


def test_a_special_token_is_parsed_on_request_as_open_clip_does():
    tokenizer = Tokenizer.clip(special_tokens="parse")
    assert tokenizer.encode("a<END_OF_TEXT>&lt;start_of_text>") == [320, 49407, 49406]
    assert tokenizer.encode("<|endoftext|>") == Tokenizer.clip().encode("<|endoftext|>")


def test_decoding_gives_the_cleaned_text_back_with_its_pieces_apart(clip):
    text = "It's a NAÏVE   café &amp; 12 日本 🙂"
    assert clip.decode(clip.encode(text)) == "it 's a naïve café & 1 2 日本 🙂"
    assert clip.decode(clip(text)[0]) == clip.decode(clip.encode(text))
    assert clip.decode([]) == ""


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab'st12!?,.é日🙂 "), max_size=30))
def test_decoded_text_has_the_same_ids_again(text):
    tokenizer = Tokenizer.clip()
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_decoding_half_a_character_gives_the_replacement_character(clip):
    assert "\ufffd" in clip.decode(clip.encode("\U00012345")[:1])


@pytest.mark.parametrize("token", [-1, 49408])
def test_decoding_refuses_ids_outside_the_vocabulary(clip, token):
    with pytest.raises(ValueError, match=f"token id {token}; .* 0 to 49407"):
        clip.decode([token])


def test_wrong_texts_are_refused_by_type_and_place():
    # In a process of its own: here the type hook would speak first.
    code = (
        "from diptych.tokenizer import Tokenizer\n"
        "t = Tokenizer.clip()\n"
        "for wrong in (b'cat', 3, None, {'a': 1}, ['cat', 3], ['cat', b'dog'], [['cat']], ['cat', None]):\n"
        "    try: t(wrong)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain_environment())
    assert done.stdout.splitlines() == [
        "texts is bytes; give a string or a list of strings",
        "texts is int; give a string or a list of strings",
        "texts is NoneType; give a string or a list of strings",
        "texts is dict; give a string or a list of strings",
        "text 1 is int, 3; give a list of strings",
        "text 1 is bytes, b'dog'; give a list of strings",
        "text 0 is list, ['cat']; give a list of strings",
        "text 1 is NoneType, None; give a list of strings",
    ], done.stderr


def plain_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_context_length_without_room_for_start_and_end_is_refused(clip, length):
    with pytest.raises(ValueError, match=f"context_length={length}; at least 2"):
        clip("a cat", context_length=length)
    with pytest.raises(ValueError, match="at least 2"):
        dataclasses.replace(clip, context_length=length)


def test_the_cache_stays_within_its_bounds_and_the_ids_stay_right(monkeypatch, small):
    monkeypatch.setattr(ChunkCache, "MAX_ENTRIES", 50)
    tokenizer = pickle.loads(pickle.dumps(small))
    for i in range(200):
        text = f"word{i} cat " + "a" * 100 + f" {i}{'!' * 60}"
        assert tokenizer.encode(text) == slow.encode(text, small.merges)
        assert len(tokenizer._chunks) <= 50
    assert max(map(len, tokenizer._chunks)) <= ChunkCache.MAX_CHARACTERS


def test_a_full_cache_keeps_the_words_that_it_began_with(monkeypatch, clip):
    tokenizer = dataclasses.replace(clip)
    known = len(tokenizer._chunks)
    monkeypatch.setattr(ChunkCache, "MAX_ENTRIES", known + 10)
    for i in range(40):
        assert tokenizer.encode(f"cat zq{i}vx") == slow.encode(f"cat zq{i}vx", clip.merges)
        assert known <= len(tokenizer._chunks) <= known + 10


@pytest.mark.parametrize("unit", ["a", "!", "1", "日", "xkcdq", "?!.,"])
def test_a_hundred_thousand_characters_without_a_space_take_no_quadratic_time(clip, unit):
    text = (unit * 100_000)[:100_000]
    started = time.perf_counter()
    assert clip.encode_batch([text]).truncated == 1
    assert time.perf_counter() - started < 10  # rounds over the whole piece take minutes


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("aabcst"), min_size=1, max_size=60))
def test_merging_by_heap_equals_merging_in_rounds(word):
    clip = Tokenizer.clip()
    assert clip.encode(word) == slow.encode(word, clip.merges)


def test_a_tokenizer_travels_to_another_process_without_its_cache(clip, small):
    clip.encode("warm the cache with this text")
    assert len(pickle.dumps(clip)) < 200
    assert pickle.loads(pickle.dumps(clip)) is clip
    other = dataclasses.replace(small, context_length=16, special_tokens="parse")
    copy = pickle.loads(pickle.dumps(other))
    assert copy == other
    assert copy("a cat").tolist() == other("a cat").tolist()


def test_equality_is_by_value_and_the_fingerprint_names_the_vocabulary(clip, small):
    longer = dataclasses.replace(small, context_length=16)
    assert small == train_bpe(CAPTIONS, vocab_size=530, context_length=8) != longer != clip
    assert hash(small) != hash(longer)
    assert small.fingerprint == longer.fingerprint != clip.fingerprint


def test_learned_merges_equal_those_of_the_slow_twin():
    captions = [*CAPTIONS, "aaaa aaa aa", "ababab abab", "banana bandana", "aaaa"]
    assert train_bpe(captions, vocab_size=544).merges == tuple(slow.train(captions, 30))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab c'é"), max_size=20), max_size=6))
def test_learned_merges_equal_those_of_the_slow_twin_on_any_captions(captions):
    captions = [*captions, "abcabd"]
    assert train_bpe(captions, vocab_size=517).merges == tuple(slow.train(captions, 3))


def test_a_trained_tokenizer_has_exactly_the_size_asked_for(small):
    assert (small.vocab_size, small.end_token_id, small.start_token_id) == (530, 529, 528)
    assert small("a cat").shape == (1, 8)
    assert small.decode(small.encode("A cat!")) == "a cat !"
    assert small.encode("a cat") == slow.encode("a cat", small.merges)


def test_training_does_not_depend_on_the_order_of_captions():
    assert train_bpe(CAPTIONS[::-1], 530) == train_bpe(iter(CAPTIONS), 530)


def test_training_refuses_a_size_it_cannot_reach():
    assert train_bpe([], vocab_size=514).encode("a") == [320]
    with pytest.raises(ValueError, match="vocab_size=513; at least 514"):
        train_bpe(CAPTIONS, vocab_size=513)
    with pytest.raises(ValueError, match=r"pairs for 516 ids, not vocab_size=600; lower it"):
        train_bpe(["cat"], vocab_size=600)


def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path, clip, small):
    for name, tokenizer in {"stock": clip, "own": dataclasses.replace(small, special_tokens="parse")}.items():
        path = tokenizer.save(tmp_path / name)
        assert path == tmp_path / name / "diptych_tokenizer.json"
        loaded = Tokenizer.load(tmp_path / name)
        assert loaded == tokenizer
        assert loaded.encode("a café") == tokenizer.encode("a café")
    assert len(pickle.dumps(Tokenizer.load(tmp_path / "stock"))) < 200


def test_loading_says_what_is_wrong_with_a_file(tmp_path, small):
    with pytest.raises(FileNotFoundError, match=r"no diptych_tokenizer\.json in .*Tokenizer\.save"):
        Tokenizer.load(tmp_path)
    path = small.save(tmp_path)
    record = json.loads(path.read_text())
    for change, message in [
        ({"colour": "red"}, r"wrong keys \['colour'\]"),
        ({"version": 2}, "does not begin with"),
        ({"format": "other"}, "does not begin with"),
        ({"merges": record["merges"][:-1]}, "do not agree"),
        ({"merges": "cat"}, "do not agree"),
        ({"merges": [*record["merges"][:-1], 3]}, "do not agree"),
        ({"merges": [*record["merges"][:-1], "cat dog"]}, "'cat dog' is no merge"),
        ({"merges": [*record["merges"][:-1], record["merges"][0]]}, "is no merge"),
        ({"context_length": 1}, "at least 2"),
        ({"context_length": "8"}, "do not agree"),
        ({"special_tokens": ["escape"]}, "do not agree"),
    ]:
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_a_vocabulary_has_clip_s():
    assert Tokenizer() == Tokenizer.clip()
    assert Tokenizer()(["a cat"]).tolist() == Tokenizer.clip()(["a cat"]).tolist()


@pytest.mark.parametrize("unit", ["amp;", "a&#109;p;", "#38;", "#38;#x26;AMP;"])
@pytest.mark.parametrize("before", ["&", "\uff06", "<\n&", "a photo of r&b\n&"])
def test_entities_in_entities_cost_no_more_than_their_text(before, unit):
    """ftfy goes over a text once for each of them: 800 kB took a quarter of an hour."""
    started = time.process_time()
    clean(before + unit * 100_000)
    assert time.process_time() - started < 5


def test_long_texts_are_repaired_as_short_ones(monkeypatch):
    parts = (
        "&amp;",
        "amp;",
        "&",
        "#38;",
        "&lt;",
        "lt;",
        "<",
        "Ã©",
        "&eacute;",
        "&#109;",
        "p;",
        " ",
        "\n",
        "\uff06",
        "x",
    )
    monkeypatch.setattr(tokens, "_LONG_TEXT", 0)
    draws = random.Random(0)
    for _ in range(2000):
        text = "".join(draws.choice([*parts, " ", "\n"]) for _ in range(draws.randrange(1, 14)))
        assert tokens._repair(text) == ftfy.fix_text(text), text
