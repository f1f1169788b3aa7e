"""Pairs per second of training, loader included: our trainer and open_clip's, same model, same shards.

    python benchmarks/train_small.py [--data FOLDER]

A 64-px ViT with patch 16, width 256, 6 layers of 4 heads; text width 256, 4 layers of 4 heads; embed_dim 256, context
77, batch 256: our preset ViT-Ti-16. Both trainers run their own unmodified loop; a hook that PyTorch calls behind every
optimizer step takes the time, and holds a trainer still while another is measured. The data are icons that the demo
builds, or any folder of .tar shards.
"""

import argparse
import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import OURS_PYTHON, PEERS_PYTHON, ROOT, Contestant, answer, matrix_rows, report, require_peers, run_rounds

BATCH_SIZE = 256
JOB = {"model": "ViT-Ti-16", "batch_size": BATCH_SIZE, "warmup_steps": 3, "steps": 4, "compile": False}
"""What is trained, and how many steps make a round."""

PRECISIONS = {"bf16": ("bfloat16", "amp_bf16"), "float32": ("float32", "fp32")}
PEER_WORKERS = 2
"""Processes that load for open_clip: its default of 4 is made for more cores."""

PEER_MODEL = {
    "embed_dim": 256,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 256, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "layers": 4, "heads": 4},
}


class Meter:
    """Called behind every optimizer step: lets the trainer run some steps a request and takes their time."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = job
        self._requests: queue.Queue[None] = queue.Queue()
        self._results: queue.Queue[dict[str, float]] = queue.Queue()
        self._steps, self._started = -job["warmup_steps"], 0.0

    def __call__(self, *_: object) -> None:
        self._steps += 1
        steps = self._job["steps"]
        if self._steps == steps:
            seconds = time.perf_counter() - self._started
            self._results.put({"pairs/s": steps * self._job["batch_size"] / seconds, "MiB": peak_memory()})
        if self._steps in (0, steps):
            self._requests.get()
            self._steps, self._started = 0, time.perf_counter()

    def measure(self) -> dict[str, float]:
        self._requests.put(None)
        return self._results.get()


def peak_memory() -> float:
    """The most that this process and its loaders have held, MiB; VmHWM, since getrusage's peak is inherited."""
    total = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in ("self", *children):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        total += int(status["VmHWM"].split()[0])
    return total / 1024


def pack(job: Mapping[str, Any]) -> str:
    """A job as an argument."""
    return json.dumps({**JOB, **job})


def serve_figures(job: Mapping[str, Any], **about: object) -> None:
    """Answer the parent from a thread beside the trainer; when the parent is done, so are we."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    meter = Meter(job)
    register_optimizer_step_post_hook(meter)

    def serve() -> None:
        answer(meter.measure, **about)
        os._exit(0)

    threading.Thread(target=serve, daemon=True).start()


def train_ours(data: str, precision: str, job: Mapping[str, Any]) -> None:
    import torch

    from diptych.model.config import get_preset
    from diptych.shards.config import LoaderConfig, SourceConfig
    from diptych.train import loop
    from diptych.train.config import OptimConfig, RunConfig, TrainConfig

    serve_figures(job, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as out:
        loop.run(
            TrainConfig(
                model=get_preset(job["model"]),
                data=(SourceConfig(path=Path(data)),),
                out=Path(out),
                loader=LoaderConfig(batch_size=job["batch_size"]),
                optim=OptimConfig(warmup=100),
                run=RunConfig(
                    steps=100_000,
                    precision=precision,  # pyright: ignore[reportArgumentType]
                    checkpoint_every=100_000,
                    compile=job["compile"],
                ),
            )
        )


def train_open_clip(data: str, precision: str, job: Mapping[str, Any]) -> None:
    import open_clip  # pyright: ignore[reportMissingImports]
    import torch
    from open_clip_train.main import main  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        if (name := job["model"]) == "ViT-Ti-16":
            name, config = "small", Path(folder) / "small.json"
            config.write_text(json.dumps(PEER_MODEL))
            open_clip.add_model_config(config)
        serve_figures(job, torch=torch.__version__, open_clip=open_clip.__version__)
        shards = "::".join(str(path) for path in sorted(Path(data).glob("*.tar")))
        main(
            f"--model {name} --train-data {shards} --dataset-type webdataset --dataset-resampled "
            f"--train-num-samples 1000000 --batch-size {job['batch_size']} --workers {PEER_WORKERS} "
            f"--precision {precision} "
            f"--epochs 1 --warmup 100 --logs {folder} --name run".split()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of .tar shards; by default the demo's training pairs")
    data = str((parser.parse_args().data or default_data()).resolve())
    require_peers()
    rows = []
    about = {}
    for name, (ours, peer) in PRECISIONS.items():
        contestants = [
            Contestant("ours", [OURS_PYTHON, __file__, "ours", data, ours, pack({})]),
            Contestant("open_clip", [PEERS_PYTHON, __file__, "open_clip", data, peer, pack({})]),
        ]
        rounds = run_rounds(contestants).pick("pairs/s")
        about[name] = rounds.about
        rows.append(rounds.row(f"pairs/s 64 px patch 16, {name}", "pairs/s", "open_clip"))
        values = rounds.values
        if name == "bf16":
            rows.append(rounds.row("pairs/s 64 px patch 16", "pairs/s", "open_clip"))  # the contract's name
        print(name, {who: [round(v, 1) for v in some] for who, some in values.items()}, flush=True)
    rows += matrix_rows()
    report("train_small", rows, batch_size=BATCH_SIZE, peer_workers=PEER_WORKERS, about=about)


def default_data() -> Path:
    """The demo's pairs, built when they are not there."""
    folder = ROOT / "runs" / "demo-pairs"
    sys.path.insert(0, str(ROOT))
    from recipes.demo import build_pairs

    build_pairs(folder)
    return folder / "training"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", data, precision, job]:
            train_ours(data, precision, json.loads(job))
        case ["open_clip", data, precision, job]:
            train_open_clip(data, precision, json.loads(job))
        case _:
            main()
