"""Seconds and memory of one loss, forward and backward: ours in tiles, open_clip's dense.

    python benchmarks/loss.py [--pairs 8192] [--many 32768]

Float32 features of 512 numbers. Memory is what the process held at most above what it held with the features made
(VmHWM), gradients of both features included, each figure from a fresh process. At 32,768 pairs the dense loss is not
run: it holds at least four matrices of 4.3 GB at once (two of logits, two log-softmaxes), and that sum is the peer.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from harness import OURS_PYTHON, PEERS_PYTHON, Contestant, answer, matrix_rows, report, require_peers, run_rounds

WIDTH = 512
LIMIT = 400.0
"""MiB above the inputs that ours may take at 32,768 pairs."""


def status(field: str) -> float:
    """A line of this process's status, MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def work(who: str, loss_name: str, pairs: int) -> None:
    """Answer with seconds and MiB of one loss and its gradients."""
    import torch
    from torch.nn.functional import normalize

    torch.manual_seed(0)
    image, text = (normalize(torch.randn(pairs, WIDTH), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-9.0, requires_grad=True)
    if who == "ours":
        from diptych.train.loss import clip_loss, siglip_loss

        def loss() -> torch.Tensor:
            if loss_name == "clip":
                return clip_loss(image, text, scale)
            return siglip_loss(image, text, scale, bias)
    else:
        from open_clip.loss import ClipLoss, SigLipLoss  # pyright: ignore[reportMissingImports]

        dense = ClipLoss() if loss_name == "clip" else SigLipLoss()

        def loss() -> torch.Tensor:
            return dense(image, text, scale) if loss_name == "clip" else dense(image, text, scale, bias)

    def measure() -> dict[str, float]:
        torch.mm(torch.randn(512, 512), torch.randn(512, 512))  # threads and their buffers are there
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
        before, started = status("VmRSS"), time.perf_counter()
        value = loss()
        value.backward()
        return {"s": time.perf_counter() - started, "MiB": status("VmHWM") - before, "loss": value.item()}

    answer(measure, torch=torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--many", type=int, default=32768)
    arguments = parser.parse_args()
    require_peers()
    rows = []
    for name, peer in (("clip", "open_clip"), ("siglip", "open_clip SigLipLoss")):
        job = [name, str(arguments.pairs)]
        done = run_rounds(
            [
                Contestant("ours", [OURS_PYTHON, __file__, "ours", *job]),
                Contestant(peer, [PEERS_PYTHON, __file__, "peer", *job]),
            ],
            fresh=True,
        )
        values = done.pick("loss").values
        assert max(abs(a - b) for a, b in zip(*values.values(), strict=True)) < 1e-3, values
        suffix = f"N={arguments.pairs}" if name == "clip" else f"N={arguments.pairs}, siglip"
        rows.append(done.pick("s").row(f"time {suffix}", "s", peer))
        rows.append(done.pick("MiB").row(f"memory {suffix}", "MiB", peer))
    many = run_rounds([Contestant("ours", [OURS_PYTHON, __file__, "ours", "clip", str(arguments.many)])], 3, fresh=True)
    seconds, memory = sorted(many.pick("s").values["ours"]), sorted(many.pick("MiB").values["ours"])
    dense = 4 * 4 * arguments.many**2 / 2**20
    case = f"N={arguments.many}"
    rows.append(row(f"memory {case}", memory[1], dense, "a dense loss, by arithmetic", "MiB"))
    rows.append(row(f"memory {case}, limit", memory[1], LIMIT, "the limit", "MiB"))
    report("loss", [*rows, *matrix_rows()], seconds={case: seconds}, memory={case: memory})
    print(f"{case}: {json.dumps([round(value, 1) for value in seconds])} s")


def row(case: str, ours: float, peer: float, name: str, unit: str) -> dict[str, object]:
    return {"case": case, "ours": ours, "peer": peer, "peer_name": name, "unit": unit, "ratio": peer / ours}


if __name__ == "__main__":
    match sys.argv[1:]:
        case [("ours" | "peer") as who, loss_name, pairs]:
            work(who, loss_name, int(pairs))
        case _:
            main()
