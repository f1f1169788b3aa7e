import dataclasses
import functools
import json
import lzma
import pickle
import shutil
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from compare_json_tokenizers import CASES, read_ours, write_folder
from compare_tokenizers import iter_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from diptych.errors import NotFoundError, UsageError
from diptych.tokenizer import Tokenizer, train_bpe
from diptych.tokenizer_json import JsonTokenizer, Rules, read_tokenizer
from diptych.tokens import CLEANERS, is_plain, repair

FIXTURE = Path(__file__).parent / "fixtures" / "tokenizer_json.json.xz"
CAPTIONS = [
    "a cat on a mat",
    "two cats",
    "the cat sat on the mat",
    "고양이 두 마리",
    "naïve café 12",
    "the dog's HAT",
] * 3
TEXTS = [text for _, text in iter_texts(650, seed=5)]


@functools.cache
def golden() -> dict:
    return json.loads(lzma.decompress(FIXTURE.read_bytes()))


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_those_of_open_clip_and_transformers_on_awkward_strings(name, tmp_path):
    """SigLIP 2's own vocabulary, as much of it as these strings need."""
    record = golden()
    write_folder(tmp_path / "model", record["vocabulary"], CASES[name])
    tokenizer = read_ours(tmp_path / "model", CASES[name])
    assert len(record["texts"]) == 1300
    for text, row, expected in zip(
        record["texts"], tokenizer(record["texts"]).tolist(), record["rows"][name], strict=True
    ):
        assert row == expected + [0] * (tokenizer.context_length - len(expected)), text


# --- small vocabularies of every kind that CLIP's families have -----------------------------------------------------


def around(*tokens: str):
    return lambda library: processors.TemplateProcessing(
        single=" ".join(tokens), special_tokens=[(t, library.token_to_id(t)) for t in tokens if t != "$A"]
    )


METASPACE = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
)
FAIRSEQ = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
LANGUAGES = ["eng_Latn", "kor_Hang"]


def unigram(specials, template, normalizer=None):
    library = Library(models.Unigram())
    library.pre_tokenizer, library.decoder = METASPACE, decoders.Metaspace()
    if normalizer is not None:
        library.normalizer = normalizer
    library.train_from_iterator(
        CAPTIONS,
        trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>", show_progress=False),
    )
    library.post_processor = template(library)
    return library


def bpe(specials, template, pre_tokenizer, alphabet=()):
    library = Library(models.BPE(unk_token=None if alphabet else "<unk>", fuse_unk=True))
    library.pre_tokenizer = pre_tokenizer
    library.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
        ),
    )
    library.post_processor = template(library)
    return library


def wordpiece():
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator(
        CAPTIONS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=specials, show_progress=False)
    )
    library.decoder = decoders.WordPiece(prefix="##")
    library.post_processor = around("[CLS]", "$A", "[SEP]")(library)
    return library


BERT = {"sep": "[SEP]", "cls": "[CLS]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
FAMILIES = {
    # library, tokenizer_class, names of special tokens, open_clip's arguments
    "SigLIP": (
        lambda: unigram(["<pad>", "</s>", "<unk>"], around("$A", "</s>"), normalizers.NFKC()),
        "PreTrainedTokenizerFast",
        {"eos": "</s>", "pad": "</s>", "unk": "<unk>"},
        {"clean": "canonicalize"},
    ),
    "CLIPA": (wordpiece, "BertTokenizer", BERT, {"clean": "whitespace", "strip_sep_token": True}),
    "MetaCLIP 2": (
        lambda: unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], around("<s>", "$A", "</s>")),
        "XLMRobertaTokenizer",
        FAIRSEQ,
        {"clean": "whitespace"},
    ),
    "NLLB": (
        lambda: bpe([*ROBERTA, *LANGUAGES], around("$A", "</s>", "eng_Latn"), METASPACE),
        "NllbTokenizer",
        FAIRSEQ,
        {"clean": "whitespace", "language": "kor_Hang"},
    ),
    "RoBERTa": (
        lambda: bpe(
            ROBERTA,
            lambda library: processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.ByteLevel.alphabet(),
        ),
        "PreTrainedTokenizerFast",
        FAIRSEQ,
        {"clean": "whitespace"},
    ),
}


def write_family(folder, name):
    build, kind, tokens, arguments = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    record = {
        "tokenizer_class": kind,
        "padding_side": "right",
        **{f"{key}_token": value for key, value in tokens.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(record))
    return arguments


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Folders of every family, written when first asked for."""
    place = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: (place / name, write_family(place / name, name)))


@pytest.fixture(scope="module")
def siglip(families) -> JsonTokenizer:
    folder, arguments = families("SigLIP")
    return read_tokenizer(folder, 16, **arguments)


def clean_slowly(text: str, clean: str) -> str:
    """As open_clip writes it, and transformers' SiglipTokenizer."""
    import html
    import re
    import string

    if clean == "siglip":
        text = text.replace("▁", " ").lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\s+", " ", text).strip()
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if clean == "canonicalize":
        return " ".join(text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower().split())
    return " ".join(text.split()).lower() if clean == "lower" else " ".join(text.split())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [5, 32])
def test_rows_equal_those_of_transformers_behind_open_clip_s_rules(families, name, length):
    transformers = pytest.importorskip("transformers")
    folder, arguments = families(name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if "language" in arguments:
        theirs.src_lang = arguments[
            "language"
        ]  # open_clip's set_language, which does not set this, is undone by a call
    texts = [clean_slowly(text, arguments["clean"]) for text in TEXTS]
    options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
    expected = theirs(texts, **options).input_ids
    if arguments.get("strip_sep_token"):
        expected = torch.where(expected == theirs.sep_token_id, theirs.pad_token_id, expected)
    rows = read_tokenizer(folder, length, special_tokens="parse", **arguments)(TEXTS)
    for text, ours, row in zip(TEXTS, rows.tolist(), expected.tolist(), strict=True):
        assert ours == row, text


@pytest.mark.parametrize("name", ["CLIPA", "MetaCLIP 2", "RoBERTa"])
def test_a_folder_that_names_no_special_tokens_is_known_by_those_it_has(families, tmp_path, name):
    folder, _ = families(name)  # the repositories of bert-base-uncased, xlm-roberta-base and roberta-base are like this
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert read_tokenizer(tmp_path, 32).rules == read_tokenizer(folder, 32).rules


def test_a_list_of_words_alone_is_read_with_bert_s_rules(families, tmp_path):
    folder, _ = families("CLIPA")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    ours, theirs = read_tokenizer(tmp_path, 32), read_tokenizer(folder, 32)
    assert ours.rules.pad == "[PAD]"
    assert torch.equal(ours(TEXTS), theirs(TEXTS))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.sampled_from(["whitespace", "lower", "canonicalize", "siglip"]))
def test_cleaning_equals_that_of_open_clip_and_transformers(text, clean):
    assert CLEANERS[clean](text) == clean_slowly(text, clean)


def test_what_is_called_plain_needs_no_repair():
    for first in map(chr, range(128)):
        text = " ".join(f"{first}{second}" for second in map(chr, range(32, 127)))
        assert not is_plain(text) or repair(text) == text


# --- the face, which is that of CLIP's own tokenizer ----------------------------------------------------------------


def test_a_batch_is_its_rows_without_padding_and_says_how_many_were_cut(siglip):
    texts = ["a cat", "", "the cat sat on the mat " * 5, "a cat on a mat"]
    batch = siglip.encode_batch(texts)
    assert (batch.truncated, batch.pad_id, batch.ids.dtype) == (1, 1, np.int32)
    assert batch.lengths[2] == 16
    assert batch.ids[batch.offsets[3] - 1] == siglip.end_token_id
    rows = siglip(texts)
    assert rows.dtype == torch.int64
    assert torch.equal(batch.padded(16), rows)
    assert rows[0].tolist() == [*siglip.encode("a cat"), *[1] * (16 - len(siglip.encode("a cat")))]
    assert siglip([]).shape == (0, 16)
    with pytest.raises(ValueError, match=r"text 2 has \d+ tokens, more than context_length=16.*truncate=True"):
        siglip(texts, truncate=False)


def test_a_row_is_as_long_as_asked_for_and_what_stands_around_the_text_stays(families):
    folder, arguments = families("NLLB")
    tokenizer = read_tokenizer(folder, 4, **arguments)
    code, end = (tokenizer._built.backend.token_to_id(token) for token in ("kor_Hang", "</s>"))
    assert tokenizer(["the cat sat"])[0, 0] == code
    assert tokenizer(["the cat sat"])[0, -1] == end
    assert tokenizer.with_context_length(9)("a").shape == (1, 9)
    assert tokenizer("the cat", context_length=2).tolist() == [[code, end]]
    with pytest.raises(ValueError, match="context_length=1; at least 2"):
        tokenizer.with_context_length(1)
    with pytest.raises(ValueError, match="only NLLB's tokenizer is told a language"):
        read_tokenizer(families("SigLIP")[0], 9, language="kor_Hang")


@pytest.mark.parametrize(("name", "written"), [("MetaCLIP 2", "</s>"), ("RoBERTa", "</s>"), ("CLIPA", "[SEP]")])
def test_a_special_token_in_a_text_is_ordinary_text_unless_it_is_asked_for(families, name, written):
    folder, _ = families(name)
    end = read_tokenizer(folder, 32).end_token_id
    for special, count in (("escape", 1), ("parse", 2)):
        row = read_tokenizer(folder, 32, special_tokens=special)(f"a {written} cat")[0].tolist()
        assert row.count(end) == count


def test_decoding_gives_the_text_back_up_to_the_end_token(siglip, families):
    assert siglip.decode(siglip("The cat, on a MAT!")[0]) == "the cat on a mat"
    folder, arguments = families("CLIPA")
    assert read_tokenizer(folder, 12, **arguments).decode([2, *read_tokenizer(folder, 9).encode("a cat"), 0]) == "a cat"
    with pytest.raises(ValueError, match="token id -1; this vocabulary has the ids 0 to"):
        siglip.decode([-1])


def test_half_a_character_becomes_the_replacement_character(siglip):
    plain = dataclasses.replace(siglip, rules=dataclasses.replace(siglip.rules, clean="none"))
    assert plain.encode("a\ud800b") == plain.encode("a\ufffdb")


def test_a_saved_tokenizer_is_loaded_as_it_was(siglip, tmp_path):
    own = dataclasses.replace(siglip, context_length=24, special_tokens="parse")
    path = own.save(tmp_path / "own")
    assert sorted(file.name for file in path.parent.iterdir()) == ["diptych_tokenizer.json", "tokenizer.json"]
    assert (path.parent / "tokenizer.json").read_bytes() == siglip.json
    loaded = Tokenizer.load(tmp_path / "own")
    assert loaded == own != siglip
    assert hash(loaded) == hash(own)
    assert torch.equal(loaded(TEXTS[:50]), own(TEXTS[:50]))
    assert isinstance(Tokenizer.load(Tokenizer.clip().save(tmp_path / "clip").parent), Tokenizer)


def test_the_key_names_all_that_ids_depend_on(siglip):
    others = [
        dataclasses.replace(siglip, context_length=24),
        dataclasses.replace(siglip, special_tokens="parse"),
        dataclasses.replace(siglip, rules=dataclasses.replace(siglip.rules, clean="lower")),
        train_bpe(CAPTIONS, 530),
        Tokenizer.clip(),
    ]
    keys = [json.dumps(one.key) for one in (siglip, *others)]
    assert len(set(keys)) == len(keys)


def test_a_tokenizer_travels_to_another_process_without_what_was_built(siglip):
    packed = pickle.dumps(siglip)
    assert len(packed) < len(siglip.json) + 1000
    assert pickle.loads(packed) == siglip
    assert torch.equal(pickle.loads(packed)("a cat"), siglip("a cat"))


def test_the_library_is_imported_when_a_tokenizer_of_this_kind_is_built():
    import subprocess

    code = "import sys, diptych.tokenizer as t; t.Tokenizer.clip()('a cat'); sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- files of unknown origin ----------------------------------------------------------------------------------------


def test_ids_that_are_left_out_count_to_the_size_of_the_vocabulary(siglip):
    record = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "</s>": 70_000}, "merges": []}}
    assert JsonTokenizer(json.dumps(record).encode(), Rules(pad="a", end="</s>")).vocab_size == 70_001


BPE = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}
HOSTILE = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "nested": b"[" * 1_000_000,
    "nested inside": b'{"version":"1.0","normalizer":' + b'{"type":"Sequence","normalizers":[' * 100_000,
    "a list": b"[]",
    "no model": b'{"version":"1.0"}',
    "a wrong type": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
    "an id that no row holds": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":4294967295},"merges":[]}}',
    "no tokens": b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}',
    "a merge of nothing": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}',
    "a table that panics": json.dumps(
        {"version": "1.0", "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "model": BPE}
    ).encode(),
    "random merges": json.dumps({"version": "1.0", "model": {**BPE, "dropout": 0.5}}).encode(),
    "a token inside of the text": json.dumps(
        {
            "version": "1.0",
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "</s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
            },
            "model": BPE,
        }
    ).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(UsageError) as caught:
        JsonTokenizer(HOSTILE[name], Rules(pad="a", end="</s>"))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_a_file_of_two_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2 << 30)  # holes take no room
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "a"}')
    with pytest.raises(UsageError, match="has more than 268,435,456 bytes"):
        read_tokenizer(tmp_path, 77)


def test_loading_says_what_is_wrong_with_a_folder(siglip, tmp_path):
    path = siglip.save(tmp_path)
    record = json.loads(path.read_text())
    for change, message in [
        ({"colour": "red"}, "wrong keys .'colour'."),
        ({"version": 2}, "does not begin with"),
        ({"rules": []}, "wrong keys"),
        ({"rules": {**record["rules"], "colour": "red"}}, "unknown key in Rules 'colour'"),
        ({"rules": {**record["rules"], "clean": "dry"}}, "'dry' is not one of the values"),
        ({"rules": {**record["rules"], "pad": "nowhere"}}, "has no token 'nowhere'"),
        ({"rules": {**record["rules"], "template": ["</s>"]}}, r"needs one \$A"),
        ({"rules": {**record["rules"], "context_length": 0}}, "at least 1"),
        ({"rules": {**record["rules"], "context_length": True}}, "makes no sense"),
        ({"vocab_size": 3}, "not the file that"),
        ({"sha256": "0" * 64}, "not the file that"),
    ]:
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(UsageError, match=message):
            Tokenizer.load(tmp_path)
    path.write_text(json.dumps(record))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"needs a tokenizer\.json: it has none"):
        Tokenizer.load(tmp_path)


def test_transformers_siglip_tokenizer_cleans_texts_by_itself(families, tmp_path):
    folder, _ = families("SigLIP")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "SiglipTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(tmp_path, 16)
    assert torch.equal(tokenizer("The_Cat, on a MAT!"), read_tokenizer(folder, 16)("thecat on a mat"))
    assert read_tokenizer(tmp_path, 16, clean="canonicalize").rules.clean == "canonicalize"


def test_reading_a_foreign_folder_says_what_it_lacks(families, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": BPE}))
    with pytest.raises(UsageError, match="names no pad_token"):
        read_tokenizer(tmp_path, 64)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": {"content": "</s>"}}')
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(NotFoundError, match=r"it has spiece\.model only, which diptych does not read; AutoTokenizer"):
        read_tokenizer(tmp_path, 64)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UsageError, match="it is no JSON object"):
        read_tokenizer(tmp_path, 64)
