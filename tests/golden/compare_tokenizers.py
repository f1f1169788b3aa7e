"""Compare `diptych.tokenizer` with open_clip's SimpleTokenizer on awkward strings: 0 differences is the goal.

    .venv/bin/python tests/golden/compare_tokenizers.py [--texts FOLDER] [--count 210000] [--seed 0]

FOLDER holds WebDataset tars whose captions (`*.txt`) are compared as well. open_clip lives in `.venv-peers`
(make peers), so this script starts itself there with `--peer` and both halves meet in a temporary folder.
"""

# pyright: reportMissingImports=false

import argparse
import gzip
import html.entities
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

WORDS_LINE = (
    "a the of on in with photo picture cat dog red bicycle Sunset mountains it's DON'T we'll you're I'd "
    "they've I'm T-shirt 4x4 iPhone12 www.example.com/a?b=c 24/7 $9.99 e-mail co-operate snake_case "
    "CamelCase rock'n'roll -- ... !!! 's 's's ''s 'sts o'clock <b>bold</b> a<b 100% #tag @name (brackets) "
    '[x] {y} "quoted" 3.14159 1,000,000 :-) <3'
)
CASES_LINE = (
    "ΑΣ ΑΣΑ Σ ΟΔΟΣ. İstanbul IĞDIR ß ẞ \u017f '\u017f it'\u017f '\u017f'T K Å Ω ŉ ǰ ǅ ﬁ ﬂ ﬀ Ⅷ ⅷ Ⓐ ⓐ ﬅ 'ST "
    "don\u2019t \u2018s \u02bcs"
)
SPECIALS_LINE = (
    "<start_of_text> <end_of_text> <END_OF_TEXT> <|startoftext|> <|endoftext|> <end_of_text <\u017ftart_of_text>"
)
WORDS, CASES, SPECIALS = WORDS_LINE.split(), CASES_LINE.split(), SPECIALS_LINE.split()
SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x250, 0x2AF), (0x370, 0x3FF), (0x400, 0x4FF),
    (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x10A0, 0x10FF),
    (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x20CF),
    (0x2100, 0x218F), (0x2460, 0x24FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xFB00, 0xFB4F), (0xFE70, 0xFEFF), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x20000, 0x20FFF),
]  # fmt: skip
EMOJI = [(0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF), (0x2600, 0x27BF), (0x1F1E6, 0x1F1FF)]
CONTROLS = [*range(0x20), *range(0x7F, 0xA1), 0x1680, 0x180E, *range(0x2000, 0x2010), *range(0x2028, 0x2030)]
CONTROLS += [0x205F, *range(0x2060, 0x2070), 0x3000, 0xFEFF, *range(0xFFF9, 0xFFFE), 0xFFFF, 0xAD]


def span(rng: random.Random, scripts: list[tuple[int, int]], low: int = 1, high: int = 8) -> str:
    script = rng.choice(scripts)
    return "".join(chr(rng.randint(*script)) for _ in range(rng.randint(low, high)))


def words(rng: random.Random) -> list[str]:
    return [rng.choice(WORDS) for _ in range(rng.randint(0, 14))]


def caption(rng: random.Random) -> str:
    text = rng.choice([" ", " ", " ", "  "]).join(words(rng))
    return rng.choice([str, str.title, str.upper, lambda whole: f" {whole}\t"])(text)


def ascii_noise(rng: random.Random) -> str:
    return span(rng, [(0x20, 0x7E)], 0, 60)


def entity(rng: random.Random) -> str:
    number = rng.choice([rng.randint(0, 0x2FF), rng.randint(0xD700, 0xE100), rng.randint(0, 0x120000)])
    name = rng.choice(ENTITY_NAMES)
    one = rng.choice([f"&{name}", f"&{name.upper()}", f"&#{number};", f"&#x{number:x};", f"&#{number}", "&", "&;"])
    return one.replace("&", rng.choice(["&", "&", "&amp;", "&amp;amp;", "&AMP"]))


def entities(rng: random.Random) -> str:
    return "".join(rng.choice([entity(rng), rng.choice(WORDS), " ", "<"]) for _ in range(rng.randint(1, 10)))


def emoji(rng: random.Random) -> str:
    joints = ["", "\u200d", "\ufe0f", "\ufe0e", "\U0001f3fd", " ", "\u20e3", "1", "cat"]
    return "".join(span(rng, EMOJI, 1, 2) + rng.choice(joints) for _ in range(rng.randint(1, 10)))


def cjk(rng: random.Random) -> str:
    blocks = [
        (0x4E00, 0x9FFF),
        (0x3040, 0x30FF),
        (0xAC00, 0xD7A3),
        (0x3000, 0x303F),
        (0xFF00, 0xFFEF),
        (0x31, 0x39),
    ]
    return "".join(span(rng, blocks, 1, 6) + rng.choice(["", " "]) for _ in range(rng.randint(1, 8)))


def combining(rng: random.Random) -> str:
    base = "".join(rng.choice([rng.choice(WORDS), span(rng, SCRIPTS[:8])]) for _ in range(rng.randint(1, 4)))
    marks = [(0x300, 0x36F), (0x483, 0x489), (0x591, 0x5BD), (0x64B, 0x65F), (0x93A, 0x94D), (0x20D0, 0x20F0)]
    return "".join(letter + (span(rng, marks, 1, 3) if rng.random() < 0.4 else "") for letter in base)


def controls(rng: random.Random) -> str:
    parts = [rng.choice(WORDS), chr(rng.choice(CONTROLS)), "\x1b[31m", "\x1b[0;1K", "\r\n", "\x00", "\x85"]
    return "".join(rng.choice([parts[0], parts[1], rng.choice(parts)]) for _ in range(rng.randint(1, 12)))


def long_run(rng: random.Random) -> str:
    size = rng.choice([50, 75, 76, 77, 78, 150, 300])
    unit = rng.choice([rng.choice("a!1_.-=z'é日🙂"), span(rng, SCRIPTS, 1, 3), rng.choice(WORDS), "a ", "' "])
    return (unit * size)[: size * rng.choice([1, 2])]


def mixed(rng: random.Random) -> str:
    return "".join(rng.choice([span(rng, SCRIPTS), rng.choice(WORDS), " "]) for _ in range(rng.randint(1, 12)))


def any_code_points(rng: random.Random) -> str:
    return "".join(
        chr(rng.randrange(rng.choice([0x300, 0x3000, 0x10000, 0x110000]))) for _ in range(rng.randint(0, 20))
    )


def mojibake(rng: random.Random) -> str:
    text = rng.choice([mixed, emoji, cjk, caption])(rng).encode("utf-8", "ignore")
    return text.decode(
        rng.choice(["latin-1", "cp1252", "cp437", "macroman", "cp1251"]), rng.choice(["ignore", "replace"])
    )


def letter_cases(rng: random.Random) -> str:
    return rng.choice([" ", ""]).join(rng.choice(rng.choice([CASES, WORDS])) for _ in range(rng.randint(1, 8)))


def special_tokens(rng: random.Random) -> str:
    return rng.choice([" ", ""]).join(rng.choice(rng.choice([SPECIALS, WORDS])) for _ in range(rng.randint(1, 8)))


ENTITY_NAMES = sorted(html.entities.html5)
KINDS: list[Callable[[random.Random], str]] = [
    caption, ascii_noise, entities, emoji, cjk, combining, controls, long_run, mixed, any_code_points,
    mojibake, letter_cases, special_tokens,
]  # fmt: skip


def iter_texts(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` pairs (kind, text), the kinds in turn; a function of its arguments alone."""
    rng = random.Random(seed)
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        yield kind.__name__, kind(rng)


def iter_code_points() -> Iterator[tuple[str, str]]:
    """Every code point there is, alone and beside a letter, a digit, a sign and a contraction; 16 to a text."""
    for start in range(0, 0x110000, 16):
        letters = [chr(code) for code in range(start, start + 16)]
        yield "all code points", " ".join(f"{x} a{x}a 1{x}1 !{x}! '{x}s" for x in letters)


def iter_captions(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.name.endswith(".txt") else None
                if stream is not None:
                    yield "captions of tars", stream.read().decode("utf-8", "replace")


def encode_with_open_clip(folder: Path) -> None:
    """The peer's half: ids and padded rows of every text."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    with (
        gzip.open(folder / "texts.json.gz", "rt") as texts,
        gzip.open(folder / "ids.json.gz", "wt", 1) as out,
    ):
        for line in texts:
            text = json.loads(line)
            answer = [tokenizer.encode(text), tokenizer([text])[0].tolist()]
            out.write(json.dumps(answer, separators=(",", ":")) + "\n")


def iter_answers(texts: list[str]) -> Iterator[tuple[list[int], list[int]]]:
    """What open_clip makes of each text: its ids and its padded row."""
    if not PEERS_PYTHON.exists():
        sys.exit(f"{PEERS_PYTHON.relative_to(ROOT)} is missing; run `make peers`")
    with tempfile.TemporaryDirectory() as folder:
        with gzip.open(Path(folder) / "texts.json.gz", "wt", 1) as out:
            out.writelines(json.dumps(text) + "\n" for text in texts)
        subprocess.run([PEERS_PYTHON, __file__, "--peer", folder], check=True)
        with gzip.open(Path(folder) / "ids.json.gz", "rt") as answers:
            yield from map(json.loads, answers)


def compare(kinds: list[str], texts: list[str]) -> Counter[str]:
    """Number of differences by kind of text."""
    from diptych.tokenizer import Tokenizer

    parsing, escaping = Tokenizer.clip(special_tokens="parse"), Tokenizer.clip()
    rows = [row for start in range(0, len(texts), 512) for row in parsing(texts[start : start + 512]).tolist()]
    differences: Counter[str] = Counter()
    for kind, text, row, (ids, peer_row) in zip(kinds, texts, rows, iter_answers(texts), strict=True):
        same = parsing.encode(text) == ids and row == peer_row
        if not {49406, 49407} & set(ids) and kind != "special_tokens":
            same &= escaping.encode(text) == ids
        if not same:
            differences[kind] += 1
            print(f"differs ({kind}): {text!r}", file=sys.stderr)
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="folder of WebDataset tars")
    parser.add_argument("--count", type=int, default=210_000, help="generated strings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        encode_with_open_clip(args.peer)
        return
    started = time.perf_counter()
    pairs = [
        *(iter_captions(args.texts) if args.texts else []),
        *iter_texts(args.count, args.seed),
        *iter_code_points(),
    ]
    kinds, texts = [kind for kind, _ in pairs], [text for _, text in pairs]
    differences = compare(kinds, texts)
    for kind, count in Counter(kinds).items():
        print(f"{kind:20} {count:8,} strings  {differences[kind]:4} differences")
    total = differences.total()
    print(f"{'all':20} {len(texts):8,} strings  {total:4} differences  ({time.perf_counter() - started:.0f} s)")
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
