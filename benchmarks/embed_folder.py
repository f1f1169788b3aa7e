"""Pictures per second from a folder of JPEGs to a file of features, end to end: `diptych embed` and open_clip.

    python benchmarks/embed_folder.py [--rounds 7] [--pictures 256]

ViT-B-32 of random weights at 224 px; pictures of 500 x 375 px at quality 90 whose colours change at several scales.
Ours is what the command runs, by default and with `exact`: listing, decoding, the tower, Parquet parts, manifest; the
model is loaded before. The peer is open_clip with its own preprocessing and a DataLoader of one worker a core, in
float32 as `create_model_and_transforms` makes it and in pure bfloat16; it writes nothing.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from harness import OURS_PYTHON, PEERS_PYTHON, Contestant, answer, matrix_rows, report, require_peers, run_rounds

BATCH_SIZE = 32


def write_pictures(folder: Path, count: int) -> None:
    """Colours that change at every scale, as in photos; noise would take twice the bytes to decode."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        picture = np.zeros((375, 500, 3))
        for cells in (4, 16, 64):
            coarse = rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            picture += np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)) / 3
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


def run_ours(pictures: str, precision: str) -> None:
    import torch

    from diptych.checkpoint.loaded import Loaded
    from diptych.embed.bulk.config import EmbedConfig, WorkConfig
    from diptych.embed.bulk.inputs import open_inputs
    from diptych.embed.bulk.job import EmbedJob, plan_parts
    from diptych.embed.images import ImageTower
    from diptych.image import Preprocess
    from diptych.model.clip import CLIP
    from diptych.model.config import get_preset
    from diptych.stage.run import Engine
    from diptych.tokenizer import Tokenizer

    torch.manual_seed(0)
    loaded = Loaded(CLIP(get_preset("ViT-B-32")).eval(), Preprocess(image_size=224), Tokenizer.clip())
    precision = ImageTower(loaded, precision).precision  # type: ignore[arg-type]
    out = Path(tempfile.mkdtemp())
    work = WorkConfig(precision=precision, batch_size=BATCH_SIZE)
    config = EmbedConfig(model="", inputs=(pictures,), out=out, work=work)

    def measure() -> float:
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        sources = tuple(open_inputs([pictures]))
        parts = plan_parts(sources, config.output.part_rows)
        job = EmbedJob(
            folder=out,
            settings={"model": {}, "settings": {}, "inputs": []},
            config=config,
            sources=sources,
            model=loaded,
        )
        report = Engine(batches=lambda tasks: [tasks]).run_job(job, parts)
        return report.kept / (time.perf_counter() - started)

    measure()
    answer(measure, torch=torch.__version__, precision=precision)
    shutil.rmtree(out, ignore_errors=True)


def run_peer(pictures: str, precision: str) -> None:
    import os

    import open_clip  # pyright: ignore[reportMissingImports]
    import torch
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", precision=precision)
    model.eval()
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    paths = sorted(Path(pictures).glob("*.jpg"))

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, i: int) -> torch.Tensor:
            return preprocess(Image.open(paths[i]))

    def measure() -> float:
        started = time.perf_counter()
        loader = torch.utils.data.DataLoader(Pictures(), BATCH_SIZE, num_workers=len(os.sched_getaffinity(0)))
        with torch.inference_mode():
            features = torch.cat([model.encode_image(image.to(dtype), normalize=True).float() for image in loader])
        assert len(features) == len(paths)
        return len(paths) / (time.perf_counter() - started)

    measure()
    answer(measure, open_clip=open_clip.__version__, torch=torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=256)
    options = parser.parse_args()
    require_peers()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), options.pictures)
        done = run_rounds(
            [
                Contestant(name, [python, __file__, side, folder, precision])
                for name, python, side, precision in (
                    ("ours", OURS_PYTHON, "ours", "auto"),
                    ("ours, exact", OURS_PYTHON, "ours", "exact"),
                    ("open_clip float32", PEERS_PYTHON, "peer", "fp32"),
                    ("open_clip pure_bf16", PEERS_PYTHON, "peer", "pure_bf16"),
                )
            ],
            options.rounds,
        )
    chosen = done.about["ours"]["precision"]
    rows = [
        done.row(f"JPEG folder to features, {chosen}", "pictures/s", "open_clip float32"),
        done.row(f"JPEG folder to features, {chosen}", "pictures/s", "open_clip pure_bf16"),
        done.row("JPEG folder to features, exact", "pictures/s", "open_clip float32", ours="ours, exact"),
    ]
    report("embed_folder", [*rows, *matrix_rows(rounds=3)], pictures=options.pictures, about=done.about)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", pictures, precision]:
            run_ours(pictures, precision)
        case ["peer", pictures, precision]:
            run_peer(pictures, precision)
        case _:
            main()
