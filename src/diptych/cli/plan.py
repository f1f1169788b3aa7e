"""`diptych plan`."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from diptych.config import to_dict
from diptych.model.config import PRESETS, CLIPConfig
from diptych.train.plan import PlanConfig, PlanReport


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what a run will cost before it starts: memory of a device, bytes on the wire, time. Arithmetic.

    Example: diptych plan ViT-L-14 --devices 64
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Architecture by name (ViT-B-32, RN50, ViT-Ti-16, ViT-B-16-SigLIP, ...), or a JSON or TOML file, as of `train`."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    json: bool = False
    """Print one JSON object instead of a table."""

    def __call__(self) -> int:
        from diptych.train import plan

        report = plan.run(self.plan, _find(self.preset))
        if self.json:
            print(json.dumps({"preset": self.preset, "config": to_dict(self.plan), **dataclasses.asdict(report)}))
        else:
            print_plan(self.preset, self.plan, report)
        return 0


def _find(preset: str) -> CLIPConfig:
    if preset in PRESETS:  # known without torch
        return PRESETS[preset]
    from diptych.checkpoint.architectures import find_architecture

    return find_architecture(preset)


def print_plan(preset: str, config: PlanConfig, report: PlanReport) -> None:
    """What a run will cost: a table of components, then whether it fits."""
    sections = {
        "parameters": {name: f"{count:,}" for name, count in report.parameters.items()},
        "FLOPs per pair": {name: f"{flops / 1e9:,.2f} G" for name, flops in report.flops_per_pair.items() if flops},
        "memory of a device": {name: _gigabytes(size) for name, size in report.memory.items() if size},
        "sent by a device, a step": {name: _gigabytes(size) for name, size in report.wire.items() if size},
        "time": {name: _duration(seconds) for name, seconds in report.seconds.items() if seconds},
    }
    table = Table("", "", "", show_header=False, box=None)
    table.columns[2].justify = "right"
    for section, rows in sections.items():
        for i, (name, value) in enumerate(rows.items()):
            table.add_row("" if i else section, name.replace("_", " "), value)
    print(
        f"{preset}: {config.batch_size:,} pairs a step on {config.devices:,} {config.device_kind}, {config.pairs:,} "
        f"on each, {report.micro_batch_size:,} at once; {config.sharding}, {config.precision}"
    )
    Console().print(table)
    total, usable = _gigabytes(report.memory["total"]), _gigabytes(report.usable_memory)
    print(f"memory: {total} of {usable} that may be filled: {'fits' if report.fits else 'does not fit'}")
    if report.largest_micro_batch:
        print(f"largest micro-batch that fits: {report.largest_micro_batch:,} of the device's {config.pairs:,} pairs")
    else:
        print("not even one pair at a time fits; try --sharding fsdp, --recompute, --half-statistics or more --devices")
    print(
        f"time: at {config.utilisation:.0%} of the device's peak, an assumption (--utilisation); nothing was measured"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
