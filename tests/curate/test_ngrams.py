"""Counting words and neighbours: exact, whatever the memory, the files and what was killed before."""

import random

import pytest

import reference.ngrams as slow
from diptych.curate.queries import ngrams
from diptych.curate.queries.ngrams import Runs, count_ngrams
from diptych.curate.text.words import split_words


def draw_lines(count: int) -> list[str]:
    draw = random.Random(5)
    words = ["New York", "dog", "Dog.", "the", "the", "of", "犬", "é", "don't", "—", "(x)", "..."]
    words += [f"w{int(draw.paretovariate(0.7)) % 500}" for _ in range(100)]
    return [" ".join(draw.choices(words, k=draw.randint(0, 15))) for _ in range(count)]


def count(folder, lines, files: int, memory: int, least: tuple[int, int], **more):
    folder.mkdir()
    places = [folder / f"{i}.txt" for i in range(files)]
    for i, place in enumerate(places):
        place.write_text("\n".join(lines[i::files]) + "\n")
    return count_ngrams(
        [str(place) for place in places],
        folder / "scratch",
        split=split_words,
        min_word_count=least[0],
        min_bigram_count=least[1],
        memory=memory,
        **more,
    )


@pytest.mark.parametrize("least", [(1, 1), (8, 3), (3, 8)])
@pytest.mark.parametrize(("files", "memory"), [(1, 1_000_000), (3, 7), (16, 40)])
def test_counts_are_those_of_the_slow_twin(least, files, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(ngrams, "_STREAM", 2048)  # many runs, many ranges ...
    monkeypatch.setattr(ngrams, "_OPEN", 5)  # ... and several rounds of merging
    lines = draw_lines(800)
    counted = count(tmp_path / "a", lines, files, memory, least)
    tokens, words, pairs = slow.count_ngrams(lines, split_words, *least)
    assert counted.tokens == tokens
    assert counted.words == words
    assert list(counted.words) == sorted(words)
    assert {(a, b): n for a, b, n, _ in counted.bigrams} == {pair: n for pair, (n, _) in pairs.items()}
    assert all(bits == pytest.approx(pairs[a, b][1]) for a, b, _, bits in counted.bigrams)


def test_processes_count_the_same(tmp_path):
    lines = draw_lines(300)
    assert count(tmp_path / "a", lines, 4, 50, (2, 2), processes=2) == count(tmp_path / "b", lines, 1, 50, (2, 2))


def test_files_that_were_read_are_not_read_again(tmp_path):
    lines = draw_lines(100)
    first = count(tmp_path / "a", lines, 2, 50, (1, 1))
    (tmp_path / "a" / "0.txt").write_bytes(b"x" * (tmp_path / "a" / "0.txt").stat().st_size)
    places = [str(tmp_path / "a" / f"{i}.txt") for i in range(2)]
    scratch = tmp_path / "a" / "scratch"
    again = count_ngrams(places, scratch, split=split_words, min_word_count=1, min_bigram_count=1, memory=50)
    assert again == first


def test_runs_add_up_and_come_sorted(tmp_path):
    runs = Runs(tmp_path / "runs", 3)
    for word in ["dog", "cat", "dog", "ant", "bee", "cat", "dog", "é", "犬", "ant"]:
        runs.add(word, 2)
    assert list(runs.items()) == [("ant", 4), ("bee", 2), ("cat", 4), ("dog", 6), ("é", 2), ("犬", 2)]
