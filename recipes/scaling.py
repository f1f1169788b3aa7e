"""`make docs`: write the tables of docs/scaling.md from `diptych plan`, so that they cannot say anything else.

What was measured comes from benchmarks/results/wire.json, which benchmarks/wire.py writes.
"""

import json
import re
from pathlib import Path

from diptych.model.config import get_preset
from diptych.train.plan import DEVICES, PlanConfig, PlanReport, run

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
WIRE = Path(__file__).parents[1] / "benchmarks" / "results" / "wire.json"
DAY = 86400
CAPTION = 77  # the paper's code computed every token

PAPER = (
    # Section 2.5: model, V100s, days. 32,768 pairs do not split evenly over 592 devices; 56 each is the next that do.
    ("ViT-L-14", PlanConfig(devices=256, device_kind="v100", caption_tokens=CAPTION, half_statistics=True), 12),
    (
        "RN50x64",
        PlanConfig(devices=592, batch_size=592 * 56, device_kind="v100", caption_tokens=CAPTION, half_statistics=True),
        18,
    ),
)
MODELS, CLUSTERS = ("ViT-B-32", "ViT-B-16", "ViT-L-14"), (8, 64, 256, 1024)


def render(page: str) -> str:
    """The page with fresh tables between their marks."""
    for name, rows in {"paper": paper(), "memory": memory(), "h100": h100(), "measured": measured()}.items():
        header, *body = ["| " + " | ".join(row) + " |" for row in rows]
        table = "\n".join([header, "|" + "---|" * len(rows[0]), *body])
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)",
            lambda marks, table=table: f"{marks[1]}{table}\n{marks[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


def paper() -> list[list[str]]:
    """What the paper's days say about the share of the peak that was reached."""
    header = ["model", "W V100", "M", "forward, GFLOP a pair", "operations of 12.8e9 pairs, 3 x forward"]
    rows = [[*header, "days in the paper", "share of the peak", "with every block recomputed", "days at 40 %"]]
    for name, config, days in PAPER:
        report = run(config, get_preset(name))
        pairs = config.samples * config.epochs
        forward = report.flops_per_pair["forward"]
        peak = DEVICES["v100"].flops["bfloat16"] * config.devices * days * DAY
        at_40 = 3 * forward * pairs / peak * days / 0.4
        numbers = [f"{config.devices}", f"{config.batch_size:,}", f"{forward / 1e9:.1f}", f"{3 * forward * pairs:.2e}"]
        shares = [f"{passes * forward * pairs / peak:.1%}".replace("%", " %") for passes in (3, 4)]
        rows.append([name, *numbers, f"{days}", *shares, f"{at_40:.1f}"])
    return rows


def memory() -> list[list[str]]:
    """What lies on one of the paper's devices."""
    parts = [name for name in run(PAPER[0][1], get_preset("ViT-L-14")).memory if name != "gathered"]
    rows = [["model", "m of N", *parts]]
    for name, config, _ in PAPER:
        report = run(config, get_preset(name))
        sizes = [f"{report.memory[part] / 1e9:.2f}" for part in parts]
        rows.append([name, f"{report.micro_batch_size} of {config.pairs}", *sizes])
    return rows


def h100() -> list[list[str]]:
    """The three ViTs on ever more devices."""
    rows = [["model", "W H100", "m of N", "GB on a device", "MB sent a step", "compute", "wire", "a step", "the run"]]
    for name in MODELS:
        for devices in CLUSTERS:
            config = PlanConfig(devices=devices)
            report = run(config, get_preset(name))
            rows.append([name, f"{devices:,}", f"{report.micro_batch_size:,} of {config.pairs:,}", *_cells(report)])
    return rows


def measured() -> list[list[str]]:
    """What ranks have sent, beside the plan's number."""
    table = [["ranks", "engine", "k", "exchange", "bytes measured", "by the formula", "measured / formula"]]
    for row in json.loads(WIRE.read_text("utf-8"))["rows"]:
        share = f"{row['ratio']:.3f}" if row["peer"] else ""
        exchange = row["exchange"].replace("_", " ")
        place = [f"{row['ranks']}", row["sharding"], f"{row['passes']}", exchange]
        table.append([*place, f"{row['ours']:,.0f}", f"{row['peer']:,.0f}", share])
    return table


def _cells(report: PlanReport) -> list[str]:
    times = [f"{report.seconds[name] * 1e3:,.1f} ms" for name in ("compute", "wire", "step")]
    hours = f"{report.seconds['run'] / 3600:,.1f} h"
    return [f"{report.memory['total'] / 1e9:.1f}", f"{report.wire['total'] / 1e6:,.0f}", *times, hours]


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8")), encoding="utf-8")
