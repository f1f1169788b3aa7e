"""Bad input of every kind, each in a process of its own with limits of memory and time: what held, and at what cost.

    python benchmarks/hostile.py [--only KIND ...] [--share 0.1] [--write]          (make hostile)

The cases are those of tests/strangers and tests/checkpoint/hostile.py. A case holds if its command ends in time and in
bounded memory, with a right exit code and without a traceback, starts no other program, changes nothing outside of its
folder, prints nothing that steers a terminal, and accounts for what it was given. `--write` puts the table into
docs/security.md.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["OMP_NUM_THREADS"] = "1"
os.umask(0o022)
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "curate")]
from strangers import corpus  # noqa: E402  # pyright: ignore[reportMissingImports]
from strangers.run import Verdict, run_cases  # noqa: E402  # pyright: ignore[reportMissingImports]
from strangers.world import build, warm  # noqa: E402  # pyright: ignore[reportMissingImports]

PAGE = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="kinds, or words of the names of cases")
    parser.add_argument("--share", type=float, default=1.0, help="part of all cases, always the same")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="one line of JSON a case instead of the table")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once")
    options = parser.parse_args()
    started = time.monotonic()
    warm()
    with tempfile.TemporaryDirectory(prefix="strangers-") as folder:
        os.chmod(folder, 0o755)
        world = build(Path(folder) / "world")
        cases = list(corpus.iter_cases(world, options.share))
        if options.only:
            cases = [c for c in cases if any(word == c.kind or word in f"{c.kind}: {c.name}" for word in options.only)]
        verdicts = []
        for verdict in run_cases(cases, world.root, options.jobs):
            verdicts.append(verdict)
            _tell(verdict, as_json=options.json)
    seconds = time.monotonic() - started
    if not options.json:
        table = make_table(verdicts, seconds)
        print(table)
        if options.write:
            write_table(table)
    sys.exit(any(verdict.wrong for verdict in verdicts))


def _tell(verdict: Verdict, *, as_json: bool) -> None:
    case = verdict.case
    if as_json:
        row = {"kind": case.kind, "name": case.name, "wrong": verdict.wrong, "peak": verdict.peak}
        print(json.dumps(row | {"seconds": verdict.seconds}), flush=True)
    elif verdict.wrong:
        print(f"FAILED {case.kind}: {case.name}: {verdict.wrong}\n    {verdict.err[-1500:]!r}", flush=True)


def make_table(verdicts: list[Verdict], seconds: float) -> str:
    """Markdown: a row a kind, and all."""
    kinds: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        kinds[verdict.case.kind].append(verdict)
        kinds["**all**"].append(verdict)
    kinds["**all**"] = kinds.pop("**all**", [])
    lines = ["| kind | bad inputs | commands that held | peak MiB | longest s |", "|---|---|---|---|---|"]
    for kind, group in kinds.items():
        held = sum(not verdict.wrong for verdict in group)
        inputs, peak = sum(v.case.inputs for v in group), max((v.peak for v in group), default=0) >> 20
        longest = max((v.seconds for v in group), default=0.0)
        lines.append(f"| {kind} | {inputs:,} | {held:,} of {len(group):,} | {peak:,} | {longest:.1f} |")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = " ".join(["python", "benchmarks/hostile.py", *(o for o in sys.argv[1:] if o != "--write")])
    cores = len(os.sched_getaffinity(0))
    return "\n".join([*lines, "", f"{today}, `{command}`, {cores} cores, {seconds / 60:.0f} minutes.", ""])


def write_table(table: str) -> None:
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}", "utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
