"""Captions to token rows: texts per second on one core, against other CLIP tokenizers.

    .venv/bin/python benchmarks/tokenizer.py            (make bench NAME=tokenizer)

The corpus is made from a seed: words in Zipf's proportions, about twelve to a caption, with capitals, commas,
full stops and numbers. `warm`: the corpus was encoded once before; `cold`: all caches are empty, as at the
start of a process. Rows are [256, 77]. Only open_clip and we repair text and unescape HTML, so only it is
asked for captions that need that.
"""

# pyright: reportMissingImports=false

import dataclasses
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness

BATCH, CAPTIONS, CONTEXT_LENGTH = 256, 20_000, 77
PEERS = ["open_clip", "instant-clip-tokenizer", "HF tokenizers", "transformers CLIPTokenizer"]
CASES = {  # corpus, heat, captions per call, peers
    "encode Zipf captions warm": ("plain", "warm", BATCH, PEERS),
    "encode Zipf captions cold": ("plain", "cold", BATCH, PEERS),
    "encode Zipf captions warm, one per call": ("plain", "warm", 1, ["open_clip"]),
    "encode Zipf captions warm, 1 in 10 with accents or entities": ("accents", "warm", BATCH, ["open_clip"]),
}
Encode = Callable[[list[str]], object]


def build_corpus(accents: bool, seed: int = 0) -> list[str]:
    """CAPTIONS captions; from rank 2,000 on every other word is a compound, which needs several tokens."""
    from diptych.tokenizer import Tokenizer

    rng = random.Random(seed)
    tokens = [merge.replace(" ", "") for merge in Tokenizer.clip().merges]
    whole = [token[:-4] for token in tokens if token.endswith("</w>") and token[:-4].isascii() and token[:-4].isalpha()]
    whole = [word for word in whole if len(word) > 1][:20_000]
    compounds = [rng.choice(whole) + rng.choice(whole) for _ in whole[2_000:]]
    ranked = whole[:2_000] + [word for both in zip(whole[2_000:], compounds, strict=True) for word in both]
    weights = [1 / rank for rank in range(1, len(ranked) + 1)]
    captions = []
    for _ in range(CAPTIONS):
        words = rng.choices(ranked, weights, k=max(1, round(rng.gauss(12, 5))))
        words = [rng.choice([f"{word},", word.title(), str(rng.randint(1, 2030)), *[word] * 9]) for word in words]
        text = " ".join([words[0].title(), *words[1:]]) + rng.choice([".", "", "", "!"])
        if accents and rng.random() < 0.1:
            text += rng.choice(
                [" caf\u00e9", " \u2013 it\u2019s", " &amp; more", " \u00a9 2019", " \u732b", " \U0001f600"]
            )
        captions.append(text)
    return captions


def build_ours() -> Encode:
    from diptych.tokenizer import Tokenizer

    return dataclasses.replace(Tokenizer.clip())  # the same vocabulary with an empty cache


def build_open_clip() -> Encode:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def build_instant() -> Encode:
    from instant_clip_tokenizer import Tokenizer

    tokenizer = Tokenizer()
    return lambda texts: tokenizer.tokenize_batch(texts, context_length=CONTEXT_LENGTH)


def build_transformers() -> Encode:
    """As a user meets it."""
    tokenizer = _clip_tokenizer_of_transformers()
    return lambda texts: (
        tokenizer(
            texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
        ).input_ids
    )


def build_hf_tokenizers() -> Encode:
    """The Rust tokenizer under it, by the quickest way it documents: no offsets, padding by itself."""
    import torch

    tokenizer = _clip_tokenizer_of_transformers().backend_tokenizer
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(length=CONTEXT_LENGTH, pad_id=0)
    return lambda texts: torch.tensor([row.ids for row in tokenizer.encode_batch_fast(texts)])


def _clip_tokenizer_of_transformers():
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    vocabulary = SimpleTokenizer()
    ids = {token: i for token, i in vocabulary.encoder.items() if i < 49406}
    ids |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=ids, merges=[tuple(pair) for pair in vocabulary.bpe_ranks])  # pyright: ignore[reportArgumentType]


BUILDERS = {
    "ours": build_ours,
    "open_clip": build_open_clip,
    "instant-clip-tokenizer": build_instant,
    "HF tokenizers": build_hf_tokenizers,
    "transformers CLIPTokenizer": build_transformers,
}


def work(name: str, corpus: Path, heat: str, batch: int) -> None:
    """One contestant in a process of its own: texts per second on request."""
    captions = json.loads(corpus.read_text())
    batches = [captions[start : start + batch] for start in range(0, len(captions), batch)]
    encode = BUILDERS[name]()
    digest = hashlib.sha256(b"".join(_lengths_and_ids(encode(texts)) for texts in batches)).hexdigest()

    def measure() -> float:
        tokenizer = BUILDERS[name]() if heat == "cold" else encode
        passes, started = 0, time.perf_counter()
        while passes == 0 or (heat == "warm" and time.perf_counter() - started < 0.5):
            for texts in batches:
                tokenizer(texts)
            passes += 1
        return passes * len(captions) / (time.perf_counter() - started)

    harness.answer(measure, ids=digest)


def _lengths_and_ids(rows: object) -> bytes:
    import numpy as np

    return np.asarray(rows).astype(np.int64).tobytes()


def main() -> None:
    harness.require_peers()
    rows, core = [], harness.one_core()
    with tempfile.TemporaryDirectory() as folder:
        corpora = {name: Path(folder) / f"{name}.json" for name in ("plain", "accents")}
        for name, path in corpora.items():
            path.write_text(json.dumps(build_corpus(accents=name == "accents")))
        for case, (corpus, heat, batch, peers) in CASES.items():
            contestants = []
            for name in ["ours", *peers]:
                python = harness.OURS_PYTHON if name == "ours" else harness.PEERS_PYTHON
                command = [python, __file__, name, corpora[corpus], heat, str(batch)]
                contestants.append(harness.Contestant(name, command, harness.ONE_THREAD, core))
            done = harness.run_rounds(contestants)
            rows += [done.row(case, "texts/s", peer) for peer in peers]
            same = [name for name in peers if done.about[name]["ids"] == done.about["ours"]["ids"]]
            print(f"{case}: same rows as ours from {', '.join(same)}", flush=True)
    harness.report("tokenizer", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
