"""Bytes that a rank really sends in a step of training, beside the formulas of docs/scaling.md.

    python benchmarks/wire.py [--preset ViT-Ti-16] [--batch-size 64]        (needs no peers; some minutes)

`diptych train` runs as 1, 2 and 4 processes over gloo, ddp and fsdp, in one pass and in two (gradient caching). What is
sent is asked of the kernel: the payload that every TCP socket of a process has sent (TCP_INFO: bytes_sent less what was
sent again, plus what still waits), so that nothing the program believes of itself comes in, and nothing of any other
process. Headers of TCP/IP are not in it. One step is measured as it is; in the next one every exchange is awaited
before the next may begin, so that its bytes are known to be its own. The peer of each row is the formula's number.
"""

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ONE_THREAD, ROOT, report

AS_IT_IS, ONE_BY_ONE, STEPS = 4, 5, 6
"""Steps that are measured, counted from 1: by then all that is made once is there."""
KINDS = {"all_gather_single": "all-gather", "reduce_scatter_single": "reduce-scatter", "all_reduce": "all-reduce"}


def sent() -> int:
    """Payload that this process has handed to the kernel on all of its TCP sockets, bytes."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                    (waiting,), (out, again) = struct.unpack_from("I", info, 144), struct.unpack_from("QQ", info, 200)
                    total += out - again + waiting
        except OSError:  # closed meanwhile
            continue
    return total


class Meter:
    """Counts the bytes of every exchange, by kind and purpose."""

    def __init__(self, embed_dim: int) -> None:
        self.embed_dim = embed_dim
        self.is_on = False
        self.bytes: Counter[str] = Counter()

    def watch(self, name: str) -> None:
        """From now on, an exchange of this name is awaited and measured while the meter is on."""
        import torch.distributed as dist

        exchange: Callable[..., Any] = getattr(dist, name)

        def measured(*tensors: Any, **named: Any) -> Any:
            if not self.is_on:
                return exchange(*tensors, **named)
            before = sent()
            work = exchange(*tensors, **named)
            if work is not None:
                work.wait()
            purpose = self.purpose(name, tensors or tuple(named.values()), sys._getframe(1).f_globals["__name__"])
            self.bytes[f"{KINDS[name]}: {purpose}"] += sent() - before
            return work

        setattr(dist, name, measured)

    def purpose(self, name: str, tensors: tuple[Any, ...], caller: str) -> str:
        """What an exchange is for, by who asked for it and what is exchanged."""
        if caller != "diptych.ranks":  # FSDP2, or the engine of ddp
            return "gradients" if name != "all_gather_single" else "weights"
        if name == "all_reduce" or tensors[0].dtype.is_floating_point is False:
            return "other"
        if name == "reduce_scatter_single":
            return "text_gradients"
        return "text_features" if tensors[0].shape[-1] == self.embed_dim else "sums"


def work(preset: str, data: str, out: str, batch_size: int, micro: int, sharding: str) -> None:
    """One rank of a run."""
    import torch

    from diptych.model.config import get_preset
    from diptych.shards.config import LoaderConfig, SourceConfig
    from diptych.train import loop
    from diptych.train.config import OptimConfig, RunConfig, TrainConfig

    model = get_preset(preset)
    meter = Meter(model.embed_dim)
    for name in KINDS:
        meter.watch(name)
    totals = []

    def on_step(step: loop.StepReport) -> None:
        totals.append(sent())
        meter.is_on = step.step == ONE_BY_ONE - 1

    loop.run(
        TrainConfig(
            model=model,
            data=(SourceConfig(path=Path(data)),),
            out=Path(out),
            loader=LoaderConfig(batch_size=batch_size, workers=0),
            optim=OptimConfig(warmup=1),
            run=RunConfig(
                steps=STEPS,
                precision="float32",
                device="cpu",
                micro_batch_size=micro,
                checkpoint_every=1000,
                sharding=sharding,  # pyright: ignore[reportArgumentType]
            ),
        ),
        on_step=on_step,
    )
    as_it_is, one_by_one = (totals[step - 1] - totals[step - 2] for step in (AS_IT_IS, ONE_BY_ONE))
    print("@wire", json.dumps({"total": as_it_is, "one by one": one_by_one, **meter.bytes, "torch": torch.__version__}))


def run_job(preset: str, data: Path, batch_size: int, ranks: int, micro: int, sharding: str) -> list[dict[str, Any]]:
    """Start all ranks, wait; what each has sent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "work", preset, str(data), f"{folder}/run"]
        command += [str(batch_size), str(micro), sharding]
        processes = []
        for rank in range(ranks):
            job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            job |= {"MASTER_PORT": port, "LOCAL_WORLD_SIZE": ranks}
            environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT / "src")}
            environment |= {name: str(value) for name, value in job.items() if ranks > 1}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("@wire")]
    if len(lines) != ranks:
        sys.exit("a rank ended early; its error is above")
    return [json.loads(line.removeprefix("@wire")) for line in lines]


def rows_of(ranks: list[dict[str, Any]], planned: dict[str, int], sharding: str, passes: int) -> list[dict[str, Any]]:
    """A table of one job: what a rank sent on average, by exchange, beside the plan."""
    mean = {
        name: sum(rank.get(name, 0) for rank in ranks) / len(ranks)
        for rank in ranks
        for name in rank
        if name != "torch"
    }
    rows = []
    for exchange in [*sorted(name for name in mean if ": " in name), "total"]:
        ours, formula = mean[exchange], planned.get(exchange.split(": ")[-1], 0)
        rows.append(
            {
                "case": f"{len(ranks)} ranks, {sharding}, k = {passes}: {exchange}",
                "ours": ours,
                "peer": formula,
                "peer_name": "formula",
                "unit": "bytes",
                "ratio": ours / formula if formula else 1.0,
                "ranks": len(ranks),
                "sharding": sharding,
                "passes": passes,
                "exchange": exchange,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="ViT-Ti-16")
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    import train
    from diptych.model.config import get_preset
    from diptych.train import plan

    rows, torch_version, started = [], None, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        train.write_data(data := Path(folder) / "shards", 2 * given.batch_size)
        for ranks in (1, 2, 4):
            for sharding in ("ddp", "fsdp") if ranks > 1 else ("ddp",):
                for passes in (1, 2) if ranks > 1 else (1,):
                    micro = given.batch_size // ranks // passes
                    config = plan.PlanConfig(
                        batch_size=given.batch_size,
                        devices=ranks,
                        micro_batch_size=micro,
                        sharding=sharding,  # pyright: ignore[reportArgumentType]
                        precision="float32",
                        samples=1e6,
                    )
                    done = run_job(given.preset, data, given.batch_size, ranks, micro, sharding)
                    torch_version = done[0]["torch"]
                    rows += rows_of(done, plan.run(config, get_preset(given.preset)).wire, sharding, passes)
                    print(rows[-1]["case"], f"{rows[-1]['ours']:,.0f} {rows[-1]['peer']:,}", flush=True)
    about = {"preset": given.preset, "batch_size": given.batch_size, "torch": torch_version}
    report("wire", rows, **about, seconds=time.monotonic() - started)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["work", preset, data, out, batch_size, micro, sharding]:
            work(preset, data, out, int(batch_size), int(micro), sharding)
        case _:
            main()
