"""Kill training at random times, start it again, and hold all that comes out to a run that was never disturbed.

    python benchmarks/kill.py [--kills 100] [--out FOLDER]        (`make kill-test`; about an hour on two cores)

A run of about ten seconds evaluates and writes checkpoints often. A third of the kills come at a random time; a third
inside the writing of a checkpoint, triggered by the appearance of its temporary folder; a third inside an evaluation,
triggered by a file that the evaluator makes when it begins. The process gets SIGKILL, which nothing can catch. Then the
run is started again, and its final weights, optimizer and random state, log and evaluations must have the sha256 of the
undisturbed run's. Half of the kills meet a compiled model. What was done is in a ledger: an interrupted test goes on.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

MOMENTS = ("any time", "checkpoint", "evaluation")
STEPS, EVERY, BATCH_SIZE = 60, 6, 32
FILES = (
    f"step_{STEPS:08d}/model.safetensors",
    f"step_{STEPS:08d}/training.safetensors",
    "metrics.jsonl",
    "skipped.jsonl",
)
"""Optimizer and random state are in training.safetensors; losses, rates, gradient norms and evaluations in the log."""


def train(data: Path, out: Path, *, compiled: bool) -> None:
    """The run: what a killed process was doing, and what the next one continues."""
    import torch

    from diptych.model.clip import CLIP
    from diptych.train import loop
    from samples import train_config  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)

    def evaluator(model: CLIP) -> dict[str, float]:
        mark = out / "evaluating"
        mark.touch()
        weight = sum(parameter.double().sum().item() for parameter in model.parameters())
        time.sleep(0.1)  # long enough to be hit
        mark.unlink()
        return {"weight": weight}

    config = train_config(
        data,
        out,
        steps=STEPS,
        batch_size=BATCH_SIZE,
        workers=1,
        checkpoint_every=EVERY,
        evaluate_every=EVERY + 1,
        keep_last=2,
        compile=compiled,
    )
    loop.run(config, evaluators=[evaluator])


def start(data: Path, out: Path, *, compiled: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", __file__, "train", str(data), str(out), str(int(compiled))]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(data: Path, out: Path, *, compiled: bool) -> dict[str, str]:
    """Train to the end; hashes of what came out."""
    if code := start(data, out, compiled=compiled).wait():
        raise RuntimeError(f"the run in {out} ended with code {code}; its error is above")
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}


@dataclass(frozen=True)
class Kill:
    """One of the table."""

    number: int
    moment: str
    compiled: bool
    at_step: int
    """Of the last checkpoint that was whole then."""
    equal: bool


def kill_once(number: int, moment: str, data: Path, out: Path, reference: dict[str, str], *, compiled: bool) -> Kill:
    """Start, kill, start again, compare."""
    rng = random.Random(number)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    process = start(data, out, compiled=compiled)
    wait_for_log(process, out)
    if moment == "any time":
        time.sleep(rng.uniform(0, 2.5))
    else:
        for _ in range(rng.randrange(1, 5)):  # the n-th occasion
            wait_for(process, out, moment)
        time.sleep(rng.uniform(0, 0.01 if moment == "checkpoint" else 0.08))
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    steps = [int(folder.name[5:]) for folder in out.glob("step_*")]
    equal = killed and finish(data, out, compiled=compiled) == reference
    return Kill(number, moment if killed else f"{moment}, too late", compiled, max(steps, default=0), equal)


def wait_for_log(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until the first step is done."""
    while process.poll() is None and not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        time.sleep(0.002)


def wait_for(process: subprocess.Popen[bytes], out: Path, moment: str) -> None:
    """Until an occasion is over, if one is under way, and the next one begins."""

    def under_way() -> bool:
        if moment == "evaluation":
            return (out / "evaluating").exists()
        return any(out.glob(".step_*.tmp"))

    while process.poll() is None and under_way():
        time.sleep(0.0005)
    while process.poll() is None and not under_way():
        time.sleep(0.0005)


def run(kills: int, out: Path) -> list[Kill]:
    """All kills, those of an earlier start included."""
    from samples import write_samples  # pyright: ignore[reportMissingImports]

    out.mkdir(parents=True, exist_ok=True)
    data, ledger = out / "data", out / "ledger.jsonl"
    if not (data / "dataset.json").exists():
        write_samples(data)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out / "compiled")
    done = [Kill(**json.loads(line)) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    references: dict[bool, dict[str, str]] = {}
    for number in range(len(done), kills):
        compiled = bool(number % 2)
        if compiled not in references:
            straight = out / f"straight-{compiled}"
            shutil.rmtree(straight, ignore_errors=True)
            references[compiled] = finish(data, straight, compiled=compiled)
        moment = MOMENTS[number // 2 % 3]
        kill = kill_once(number, moment, data, out / "killed", references[compiled], compiled=compiled)
        with open(ledger, "a") as file:
            file.write(json.dumps(vars(kill)) + "\n")
        done.append(kill)
        print(kill, flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kill-test")
    arguments = parser.parse_args()
    done = run(arguments.kills, arguments.out)
    from harness import report

    rows = []
    for moment in sorted({kill.moment for kill in done}):
        for compiled in (False, True):
            those = [kill for kill in done if (kill.moment, kill.compiled) == (moment, compiled)]
            equal = sum(kill.equal for kill in those)
            case = f"killed: {moment}, {'compiled' if compiled else 'eager'}"
            ratio = equal / len(those) if those else 1.0
            rows.append(
                {"case": case, "ours": equal, "peer": len(those), "peer_name": "kills", "unit": "runs", "ratio": ratio}
            )
    report("kill", rows)
    sys.exit(not all(kill.equal for kill in done))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", data, out, compiled]:
            train(Path(data), Path(out), compiled=compiled == "1")
        case _:
            main()
