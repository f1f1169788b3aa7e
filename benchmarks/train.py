"""Pairs per second, and memory, of training ViT-B-32 at 224 px in bfloat16: our trainer and open_clip's.

    python benchmarks/train.py [--rounds 7]

Batch 64, captions of about 14 tokens, the same shards, each trainer's own unmodified loop with its loader. Pictures are
noise and captions are common words: neither trainer looks at what is in them. PyTorch's hook behind each optimizer step
takes the time (train_small.py); memory is the most that the process has held by the end of a round.
"""

import argparse
import tempfile
from pathlib import Path

import train_small
from harness import OURS_PYTHON, PEERS_PYTHON, Contestant, matrix_rows, report, require_peers, run_rounds

BATCH_SIZE = 64
WORDS = ["a", "photo", "of", "the", "red", "house", "by", "river", "under", "old", "trees", "two", "boats"]


def write_data(folder: Path, samples: int = 512) -> None:
    """Shards of pictures with a shorter side of 256 px."""
    import io

    import numpy as np
    from PIL import Image

    from diptych.pair import Pair
    from diptych.shards.write import write_shards

    rng = np.random.default_rng(0)

    def pairs() -> "list[Pair]":
        made = []
        for i in range(samples):
            coarse = rng.integers(0, 256, (32, 43, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((344, 256)).save(buffer, "JPEG", quality=90)
            caption = " ".join(rng.choice(WORDS, int(rng.integers(8, 17))))  # 12 words and two special tokens
            made.append(Pair(key=f"{i:06d}", caption=caption, image=buffer.getvalue()))
        return made

    write_shards(pairs(), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    require_peers()
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "shards")
        write_data(Path(data))
        job = {"model": "ViT-B-32", "batch_size": BATCH_SIZE, "warmup_steps": 4, "steps": 2}

        def contestant(name: str, python: str, trainer: str, precision: str, **more: object) -> Contestant:
            return Contestant(
                name, [python, train_small.__file__, trainer, data, precision, train_small.pack(job | more)]
            )

        done = run_rounds(
            [
                contestant("ours", str(OURS_PYTHON), "ours", "bfloat16", compile=True),
                contestant("ours, eager", str(OURS_PYTHON), "ours", "bfloat16"),
                contestant("open_clip amp_bf16", str(PEERS_PYTHON), "open_clip", "amp_bf16"),
            ],
            rounds,
        )
    speed, memory = done.pick("pairs/s"), done.pick("MiB")
    rows = [
        speed.row("pairs/s ViT-B-32", "pairs/s", "open_clip amp_bf16"),
        speed.row("pairs/s ViT-B-32, not compiled", "pairs/s", "open_clip amp_bf16", ours="ours, eager"),
        memory.row("memory ViT-B-32", "MiB", "open_clip amp_bf16"),
        memory.row("memory ViT-B-32, not compiled", "MiB", "open_clip amp_bf16", ours="ours, eager"),
        *matrix_rows(),
    ]
    report("train", rows, batch_size=BATCH_SIZE, about=done.about)


if __name__ == "__main__":
    main()
