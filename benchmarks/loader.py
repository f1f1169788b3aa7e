"""Samples per second and core of loading alone: our loader, and webdataset with torchvision's transforms.

    python benchmarks/loader.py [--rounds 7]

Each contestant has one core. From JPEG shards (shorter side 256 px) come normalised float32 pictures of 64 or of 224 px
and token ids. The peer's pipeline is the one that open_clip trains with, its transform (RandomResizedCrop, ToTensor,
Normalize) and its tokenizer included. Then our trainer runs a 64-px model on both cores, and says which share of the
time it waited for data.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import train
from harness import (
    ONE_THREAD,
    OURS_PYTHON,
    PEERS_PYTHON,
    Contestant,
    answer,
    one_core,
    report,
    require_peers,
    run_rounds,
)

BATCH_SIZE = 256
BATCHES = 2
SIZES = (64, 224)


def load_ours(data: str, size: int) -> None:
    from diptych.image import Preprocess
    from diptych.shards.config import LoaderConfig, SourceConfig
    from diptych.shards.loader import Loader
    from diptych.tokenizer import Tokenizer

    config = LoaderConfig(batch_size=BATCH_SIZE, workers=0)
    batches = iter(Loader([SourceConfig(path=Path(data))], config, size, Tokenizer.clip()))
    preprocess = Preprocess(image_size=size)

    def measure() -> float:
        started = time.perf_counter()
        for batch in itertools.islice(batches, BATCHES):
            assert preprocess.normalize(batch.image).shape == (BATCH_SIZE, 3, size, size)
        return BATCHES * BATCH_SIZE / (time.perf_counter() - started)

    measure()
    answer(measure)


def load_peer(data: str, size: int) -> None:
    import open_clip  # pyright: ignore[reportMissingImports]
    import torch
    import webdataset as wds  # pyright: ignore[reportMissingImports]
    from open_clip.transform import image_transform  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    transform, tokenize = image_transform(size, is_train=True), open_clip.get_tokenizer("ViT-B-32")
    shards = sorted(str(path) for path in Path(data).glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(1000, initial=500)
        .decode("pilrgb")
        .to_tuple("jpg;png", "txt")
        .map_tuple(transform, lambda text: tokenize(text)[0])
        .batched(BATCH_SIZE)
    )
    batches = iter(wds.WebLoader(dataset, batch_size=None, num_workers=0))

    def measure() -> float:
        started = time.perf_counter()
        for image, text in itertools.islice(batches, BATCHES):
            assert image.shape == (BATCH_SIZE, 3, size, size)
            assert text.shape == (BATCH_SIZE, 77)
        return BATCHES * BATCH_SIZE / (time.perf_counter() - started)

    measure()
    answer(measure, webdataset=wds.__version__, open_clip=open_clip.__version__)


def data_wait(data: str, steps: int = 24) -> list[float]:
    """Share of each step's time that our trainer waited for data, the first steps left out."""
    from diptych.model.config import get_preset
    from diptych.shards.config import LoaderConfig, SourceConfig
    from diptych.train import loop
    from diptych.train.config import OptimConfig, RunConfig, TrainConfig

    shares: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        loop.run(
            TrainConfig(
                model=get_preset("ViT-Ti-16"),
                data=(SourceConfig(path=Path(data)),),
                out=Path(out),
                loader=LoaderConfig(batch_size=BATCH_SIZE),
                optim=OptimConfig(warmup=2),
                run=RunConfig(steps=steps, checkpoint_every=steps),
            ),
            on_step=lambda step: shares.append(step.data_wait),
        )
    return shares[4:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    require_peers()
    rows, about = [], {}
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "shards")
        train.write_data(Path(data), samples=2048)
        for size in SIZES:
            done = run_rounds(
                [
                    Contestant(name, [python, __file__, name, data, str(size)], ONE_THREAD, one_core())
                    for name, python in (("ours", OURS_PYTHON), ("webdataset", PEERS_PYTHON))
                ],
                rounds,
            )
            rows.append(done.row(f"loader samples/s/core {size} px", "samples/s", "webdataset"))
            about = done.about
        shares = data_wait(data)
    wait = {"median": statistics.median(shares), "largest": max(shares), "steps": len(shares)}
    print(f"data wait in 64-px training: median {wait['median']:.2%}, largest {wait['largest']:.2%} of a step")
    report("loader", rows, batch_size=BATCH_SIZE, about=about, data_wait=wait)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", data, size]:
            load_ours(data, int(size))
        case ["webdataset", data, size]:
            load_peer(data, int(size))
        case _:
            main()
