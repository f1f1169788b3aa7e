"""Write tests/fixtures/tokenizer_open_clip.json.gz: awkward strings and the ids open_clip gives them.

.venv-peers/bin/python tests/golden/make_tokenizer_fixture.py
"""

# pyright: reportMissingImports=false

import gzip
import json
from importlib.metadata import version

from compare_tokenizers import ROOT, iter_texts
from open_clip.tokenizer import SimpleTokenizer


def main() -> None:
    tokenizer = SimpleTokenizer()
    texts = [text for _, text in iter_texts(3900, seed=1)]
    record = {
        "made_by": f"open_clip_torch {version('open_clip_torch')}, ftfy {version('ftfy')}",
        "texts": texts,
        "ids": [tokenizer.encode(text) for text in texts],
    }
    path = ROOT / "tests" / "fixtures" / "tokenizer_open_clip.json.gz"
    packed = gzip.compress(json.dumps(record, separators=(",", ":")).encode(), mtime=0)  # same bytes every time
    path.write_bytes(packed)
    print(f"{path.relative_to(ROOT)}: {len(texts)} texts, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
