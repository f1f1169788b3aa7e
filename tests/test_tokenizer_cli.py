import json

import pytest

from diptych.cli import main
from diptych.model.config import PRESETS
from diptych.tokenizer import Tokenizer, train_bpe
from diptych.train.setup import fit_vocabulary, read_tokenizer
from samples import write_samples

KOREAN = ["작은 고양이 두 마리", "웃는 고양이 얼굴", "고양이 두 마리가 웃는다", "빨간 자전거"] * 4


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def korean(tmp_path):
    path = tmp_path / "ko.txt"
    path.write_text("\n".join(KOREAN) + "\n\n", encoding="utf-8")
    return path


def test_a_vocabulary_is_learned_from_text_files_and_shards_together(tmp_path, korean, capsys):
    shards = write_samples(tmp_path / "data", count=8)
    arguments = ["--data", korean, shards, "--out", tmp_path / "own", "--vocab-size", 560, "--context-length", 24]
    assert call("tokenizer", "train", *arguments) == 0
    out = capsys.readouterr().out
    assert "560 ids: " in out
    assert "tokens a caption, of the first 24 captions: " in out
    own = Tokenizer.load(tmp_path / "own")
    assert (own.vocab_size, own.context_length) == (560, 24)
    assert own.decode(own.encode("작은 고양이")) == "작은 고양이"
    assert len(own.encode("고양이")) < len(Tokenizer.clip().encode("고양이"))


def test_a_learned_vocabulary_is_what_training_takes(tmp_path, korean):
    shards = write_samples(tmp_path / "data", count=8)
    assert call("tokenizer", "train", "--data", korean, "--out", tmp_path / "own", "--vocab-size", 530) == 0
    arguments = ["--data", shards, "--out", tmp_path / "run", "--tokenizer", tmp_path / "own", "--steps", 2]
    arguments += ["--warmup", 1, "--batch-size", 8, "--workers", 0, "--precision", "float32"]
    assert call("train", "RN-Ti", *arguments) == 0
    assert Tokenizer.load(tmp_path / "run" / "step_00000002").vocab_size == 530


def test_a_tokenizer_whose_end_is_not_its_highest_id_is_found_by_its_id(tmp_path, monkeypatch):
    own = train_bpe(KOREAN, 530)
    own.save(tmp_path / "own")
    monkeypatch.setattr(Tokenizer, "end_token_id", 7)
    text = fit_vocabulary(PRESETS["RN-Ti"].text, read_tokenizer(tmp_path / "own"))
    assert (text.end_id, text.vocab_size) == (7, own.vocab_size)


def test_a_place_that_holds_a_tokenizer_or_nothing_to_learn_from_is_refused(tmp_path, korean, capsys):
    assert call("tokenizer", "train", "--data", korean, "--out", tmp_path / "own", "--vocab-size", 520) == 0
    for arguments, message in [
        (["--data", korean, "--out", tmp_path / "own"], "holds a tokenizer; name another --out"),
        (["--data", tmp_path / "none", "--out", tmp_path / "a"], "no such file or folder"),
        (["--data", tmp_path, "--out", tmp_path / "a"], "no .tar shards"),
        (["--data", korean, "--out", tmp_path / "a", "--vocab-size", "9000"], "lower it or give more captions"),
    ]:
        assert call("tokenizer", "train", *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "a").exists()


def test_show_prints_pieces_ids_and_counts(tmp_path, korean, capsys):
    assert call("tokenizer", "show", "clip", "A cat!", "cat " * 100) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "49,408 ids, texts of up to 77 tokens",
        "A cat!  (5 tokens)",
        "  a</w> | cat</w> | !</w>",
        "  320 2368 256",
    ]
    assert lines[4].endswith("  (77 tokens, cut)")
    train_bpe(KOREAN, 560, context_length=9).save(tmp_path / "own")
    assert call("tokenizer", "show", tmp_path / "own", "웃는 고양이", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["vocab_size"], shown["context_length"]) == (560, 9)
    (text,) = shown["texts"]
    assert text["pieces"] == ["웃는</w>", "고양이</w>"]
    assert (text["tokens"], text["cut"]) == (4, False)
    (tmp_path / "foreign").mkdir()
    vocabulary = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []}}
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(vocabulary))
    (tmp_path / "foreign" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "</s>"}')
    assert call("tokenizer", "show", tmp_path / "foreign", "ab") == 0
    assert "ab  (2 tokens)\n  a | b\n  0 1\n" in capsys.readouterr().out
    assert call("tokenizer", "show", tmp_path / "nothing", "a") == 2
    assert "no such model" in capsys.readouterr().err
