"""A global batch that fits into no memory: 32,768 pairs a step through a 64-px ViT, by gradient caching.

    python benchmarks/big_batch.py [--batch-size 32768] [--steps 2]

Says which micro-batch the trainer chose by itself, how long a step took and the most memory that the process held,
loader included. That the gradient equals the one-pass gradient is a test (tests/train/test_step.py).
"""

import argparse
import tempfile
from pathlib import Path

import train
from harness import report
from train_small import peak_memory

SAMPLES = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--preset", default="ViT-Ti-16")
    given = parser.parse_args()

    from diptych.model.config import get_preset
    from diptych.shards.config import LoaderConfig, SourceConfig
    from diptych.train import loop
    from diptych.train.config import OptimConfig, RunConfig, TrainConfig

    speeds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "shards", Path(folder) / "run"
        train.write_data(data, SAMPLES)
        done = loop.run(
            TrainConfig(
                model=get_preset(given.preset),
                data=(SourceConfig(path=data, weight=2 * given.batch_size / SAMPLES),),
                out=out,
                loader=LoaderConfig(batch_size=given.batch_size),
                optim=OptimConfig(warmup=1),
                run=RunConfig(steps=given.steps),
            ),
            on_step=lambda step: speeds.append(step.pairs_per_second),
        )
    figures = {
        "preset": given.preset,
        "batch_size": given.batch_size,
        "micro_batch_size": done.micro_batch_size,
        "seconds_per_step": [given.batch_size / speed for speed in speeds],
        "pairs_per_second": speeds,
        "peak_memory_mib": peak_memory(),
        "loss": done.loss,
    }
    print(figures)
    report("big_batch", [], **figures)


if __name__ == "__main__":
    main()
