"""A part of tests/strangers, the corpus of bad input that `make hostile` runs whole, and proof that its rules bite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_corpus(*options: str) -> list[dict]:
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "hostile.py", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def find_faults(rows: list[dict]) -> list[str]:
    return [f"{row['kind']}: {row['name']}: {row['wrong']}" for row in rows if row["wrong"]]


def test_a_few_of_every_kind_hold():
    rows = run_corpus("--share", "0.01")
    assert find_faults(rows) == []
    assert len({row["kind"] for row in rows}) == 9


@pytest.mark.slow
def test_a_tenth_of_the_corpus_holds():
    assert find_faults(run_corpus("--share", "0.1")) == []


RULES = {
    "raise ValueError": "traceback: ValueError",
    "print(chr(27))": "was printed raw",
    "sys.exit(3)": "exit code 3",
    "os.kill(os.getpid(), 11)": "crash: signal 11",
    "while True: pass": "hang: more than 2 s",
    "data = b'x' * (700 << 20); time.sleep(1)": "memory: more than",
    "print('diptych: there is not enough memory')": "memory ran out",
    "subprocess.run(['true'])": "not allowed: 'started true'",
    "open('/tmp/strangers-test', 'w')": "not allowed: 'open /tmp/strangers-test",
    "os.remove('../beside/thesis.txt')": "not allowed: 'os.remove",
    "open('../beside/other', 'w')": "not allowed: 'open",
    "print('x' * 9000, file=sys.stderr)": "a line without an end",
    "open('fine', 'w')": "",
}


def test_every_rule_finds_who_breaks_it(tmp_path):
    """Each in a command that does nothing but break it."""
    script = f"""
import json, os, subprocess, sys, time
import diptych.cli
from pathlib import Path
from strangers.case import Case, MIB
from strangers.run import run_cases
diptych.cli.main = lambda arguments: exec(arguments[0], globals())
(shared := Path({str(tmp_path)!r}) / "shared").mkdir()
cases = [Case("rule", text, lambda folder, text=text: [text], seconds=2, peak=500 * MIB) for text in {list(RULES)!r}]
print(json.dumps({{one.case.name: one.wrong for one in run_cases(cases, shared)}}))
"""
    places = [str(ROOT / part) for part in ("src", "tests")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for text, word in RULES.items():
        assert word in found[text] if word else not found[text], (text, found[text])
