"""Where models are computed: what a device's name means on this machine."""

import torch

from diptych.errors import UsageError
from diptych.ranks import Ranks


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """`auto` takes a GPU if there is one; every rank of a machine its own. UsageError for one that is not there."""
    there = _count_devices()
    kind = ("cuda" if "cuda" in there else "cpu") if name == "auto" else name
    if kind == "cuda" and ranks is not None and ranks.world_size > 1:
        kind = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(kind)
    except RuntimeError:  # no name that PyTorch knows
        device = None
    if device is None or (device.index or 0) >= there.get(device.type, 0):
        known = ", ".join(f"{kind}:{i}" if count > 1 else kind for kind, count in there.items() for i in range(count))
        raise UsageError(f"no device {kind!r} here; PyTorch finds {known} on this machine: use one of these, or auto")
    return device


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating point of a device: Apple's has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _count_devices() -> dict[str, int]:
    """Kind -> how many of it this machine has."""
    counts = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "xpu": torch.xpu.device_count()}
    counts["cuda"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {kind: count for kind, count in counts.items() if count}
