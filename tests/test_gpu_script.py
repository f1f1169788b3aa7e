"""benchmarks/gpu.py, on a processor and with tiny sizes: nobody may find out on a lent machine that it does not run."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpu

SCRIPT = Path(gpu.__file__)


def run_small(out: Path, only: str = "", *more: str) -> dict:
    command = [
        sys.executable,
        str(SCRIPT),
        "--device",
        "cpu",
        "--size",
        "small",
        "--out",
        str(out),
        "--only",
        only,
        *more,
    ]
    subprocess.run(command, check=False, capture_output=True)
    return json.loads(out.read_text("utf-8"))


def test_sections_measure_and_write_their_rows(tmp_path):
    record = run_small(tmp_path / "new/gpu.json", "machine,loss")
    assert list(record["sections"]) == ["machine", "loss"]
    assert [section["error"] for section in record["sections"].values()] == [None, None]
    rows = {row["case"]: row for section in record["sections"].values() for row in section["rows"]}
    assert rows["matrix product, bfloat16"]["tflops"] > 0
    assert rows["difference of the losses"]["absolute"] < 1e-4
    assert record["missing"] == [name for name in record["missing"] if name in gpu.MODULES]


@pytest.mark.slow
def test_all_sections_run(tmp_path):
    record = run_small(tmp_path / "gpu.json", "", "--minutes", "30")  # a compiler takes its time on a processor
    assert {name: section["error"] for name, section in record["sections"].items()} == dict.fromkeys(gpu.SECTIONS)
    assert all(row["equal"] for row in record["sections"]["parity"]["rows"])
    assert all(row["equal_bits"] for row in record["sections"]["resume"]["rows"])
    trained = [row["case"] for row in record["sections"]["train ViT-L-14"]["rows"] if row.get("pairs_per_s")]
    assert trained == ["ours, eager", "ours, compiled"]


@pytest.mark.parametrize(
    ("code", "rows", "error"),
    [
        ("print('noise'); print('@row', '{\"case\": \"a\"}')", [{"case": "a"}], None),
        ("print('@row', '{\"case\": \"a\"}', flush=True); raise ValueError('no kernel')", [{"case": "a"}], "no kernel"),
        ("print('@row', '{\"case\": \"a\"}', flush=True); import time; time.sleep(60)", [{"case": "a"}], "s were over"),
        ("import os; os.kill(os.getpid(), 9)", [], "exit code -9"),
    ],
)
def test_a_section_that_fails_or_takes_too_long_keeps_its_rows(code, rows, error):
    section: dict = {"error": None}
    began = time.monotonic()
    assert list(gpu.follow([sys.executable, "-c", code], {}, 3.0, section)) == rows
    assert time.monotonic() - began < 30
    assert error in section["error"] if error else section["error"] is None


def test_a_failed_section_does_not_end_the_run(tmp_path, monkeypatch):
    def follow(command: list[str], env: dict, seconds: float, section: dict):
        name = command[command.index("--section") + 1]
        if name == "parity":
            section["error"] = "exit code 1: out of luck"
        yield {"case": name}

    monkeypatch.setattr(gpu, "follow", follow)
    out = tmp_path / "gpu.json"
    gpu.run(argparse.Namespace(out=out, wheels=None, minutes=8.0, only="", device="cpu", size="small"))
    sections = json.loads(out.read_text("utf-8"))["sections"]
    assert {name: section["error"] for name, section in sections.items() if section["error"]} == {
        "parity": "exit code 1: out of luck"
    }
    assert [section["rows"] for section in sections.values()] == [[{"case": name}] for name in gpu.SECTIONS]
    assert sum(section["budget_s"] for section in sections.values()) > 480  # what nobody used goes to the next ones


def test_the_stand_in_for_jaxtyping_is_enough_for_the_towers(tmp_path):
    (tmp_path / "jaxtyping.py").write_text(gpu.STAND_IN)
    code = (
        "import jaxtyping, diptych.model.clip, diptych.train.loss, diptych.train.optim\n"
        f"assert jaxtyping.__file__.startswith({str(tmp_path)!r}), jaxtyping.__file__\n"
    )
    path = os.pathsep.join([str(tmp_path), str(gpu.ROOT / "src")])
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=True)
