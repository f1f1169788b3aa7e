"""Training jobs of several processes, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from samples import train_config

SCRIPT = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
import dataclasses
from pathlib import Path, PosixPath
import torch
from samples import TINY_RESNET, TINY_VIT, make_loaded, train_config
from diptych.errors import DiptychError
from diptych.train import loop, setup, trainer
torch.set_num_threads(1)
config = train_config(Path({data!r}), Path({out!r}), **{options})
loss = dataclasses.replace(config.loss, **{loss})
model = dataclasses.replace(config.model, logit_bias=loss.loss == "siglip")
config = dataclasses.replace(config, loss=loss, model=model)
def on_step(report):
    {on_step}
def on_note(line):
    {on_note}
evaluators = []
if {evaluate!r}:
    from diptych.cli.training import build_evaluators
    from diptych.image import Preprocess
    preprocess = Preprocess(image_size=config.model.vision.image_size)
    evaluators = build_evaluators({evaluate!r}, setup.load_tokenizer(config), preprocess)
try:
    {work}
except DiptychError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(2)
"""


def start(
    data: Path,
    out: Path,
    world_size: int,
    *,
    on_step: str = "pass",
    on_note: str = "pass",
    loss: dict | None = None,
    evaluate: tuple[str, ...] = (),
    work: str = "loop.run(config, on_step=on_step, on_note=on_note, evaluators=evaluators)",
    **options,
) -> list[subprocess.Popen]:
    """One process a rank; with one rank no job at all."""
    assert train_config(data, out, **{k: v for k, v in options.items() if k != "model"})
    model = options.pop("model", "TINY_VIT")
    shown = ", ".join([f"'model': {model}", *(f"{name!r}: {value!r}" for name, value in options.items())])
    tests = str(Path(__file__).parents[1])
    script = SCRIPT.format(
        tests=tests,
        data=str(data),
        out=str(out),
        options=f"{{{shown}}}",
        loss=loss or {},
        on_step=on_step,
        on_note=on_note,
        evaluate=evaluate,
        work=work,
    )
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        job |= {"MASTER_PORT": port, "LOCAL_WORLD_SIZE": world_size}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            environment |= {name: str(value) for name, value in job.items()}
        processes.append(
            subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    """Wait until all have ended well; what they printed."""
    output = []
    for process in processes:
        try:
            output.append(process.communicate(timeout=timeout)[0])
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
    assert [process.returncode for process in processes] == [0] * len(processes), output
    return output


def run(data: Path, out: Path, world_size: int, **options) -> list[str]:
    """Start and finish."""
    return finish(start(data, out, world_size, **options))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
