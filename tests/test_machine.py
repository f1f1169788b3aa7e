"""Linux, macOS, Windows: what the tests' own machine does not have is taken away from it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diptych import files, machine
from diptych.cli.training import Pace
from diptych.curate.pages.extract import Extract
from diptych.curate.pages.sandbox import Parser
from diptych.errors import UsageError
from evaluate import exams
from samples import draw, encode, write_samples

TESTS = Path(__file__).parent

ABSENT = """
import builtins, errno, fcntl, io, multiprocessing, os, select, signal, stat, warnings
for module, names in {
    os: "sched_getaffinity fork pread pwrite getloadavg mkfifo sysconf posix_fadvise O_DIRECTORY",
    select: "poll epoll",
    signal: "SIGPROF setitimer",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
multiprocessing.set_start_method("spawn")

def refused(call):  # Linux' own files
    def opened(path, *arguments, **named):
        if str(path).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(errno.ENOENT, "not Linux", str(path))
        return call(path, *arguments, **named)
    return opened

builtins.open, io.open = refused(builtins.open), refused(io.open)
open_, fsync, import_ = os.open, os.fsync, builtins.__import__

def open_no_folder(path, *arguments, **named):  # Windows
    descriptor = open_(path, *arguments, **named)
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PermissionError(errno.EACCES, "it is a folder", str(path))
    return descriptor

def sync_what_can_be_written(descriptor):  # Windows
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "not open for writing")
    fsync(descriptor)

def import_no_unix(name, globals=None, *arguments, **named):  # other packages look after themselves
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("diptych"):
        raise ModuleNotFoundError(name=name)
    return import_(name, globals, *arguments, **named)

os.open, os.fsync, builtins.__import__ = open_no_folder, sync_what_can_be_written, import_no_unix
warnings.filterwarnings("error", category=EncodingWarning, module="diptych")  # Windows' encoding is not UTF-8
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, str]:
    """The environment of a process on a system that has nothing of Linux' own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "sitecustomize.py").write_text(ABSENT)
    paths = [str(folder), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNDEFAULTENCODING": "1"}


COMMANDS = """
import sys
from pathlib import Path
from diptych.cli import main

def call(*arguments):
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        assert ended.code == 0, (arguments, ended.code)

folder = Path(sys.argv[1])
sizes = ("--batch-size", 8, "--workers", 2, "--precision", "float32")
call("train", "RN-Ti", "--data", folder / "data", "--out", folder / "run", "--steps", 2, "--warmup", 1, *sizes)
call("classify", folder / "pictures", "--labels", "red dot", "blue ring", "--model", folder / "run", "--json")
call("embed", folder / "run", folder / "pictures", "--out", folder / "features", "--part-rows", 40, "--json")
call("evaluate", "--model", folder / "run", "--suite", folder / "own.toml", "--out", folder / "results", "--json")
print("all four")
"""


@pytest.mark.slow
def test_commands_run_without_what_only_linux_has(elsewhere, tmp_path):
    write_samples(tmp_path / "data")
    exams.write_shapes(tmp_path / "shapes")
    exams.write_own(tmp_path / "own.toml")
    (tmp_path / "pictures").mkdir()
    for number in range(70):  # more than a batch: they are read ahead
        (tmp_path / f"pictures/{number}.jpg").write_bytes(encode(draw("red", "dot", 20 + number)))
    command = [sys.executable, "-c", COMMANDS, str(tmp_path)]
    done = subprocess.run(command, env=elsewhere, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("all four\n"), done.stdout[-2000:] + done.stderr[-4000:]
    assert sum('"labels": ' in line for line in done.stdout.splitlines()) == 70
    assert '"missing": {}' in done.stdout


def test_what_was_taken_away_is_away(elsewhere):
    code = """
from diptych import machine
assert machine.fcntl is machine.resource is None and not machine.HAS_LIMITS
assert machine.count_cores() >= 1 and machine.peak_memory() == 0 and machine.busy_cores() == 0
assert machine.free_memory() == machine.UNKNOWN_MEMORY
"""
    subprocess.run([sys.executable, "-c", code], env=elsewhere, check=True)


def test_threads_read_and_write_at_offsets_without_pread(monkeypatch, tmp_path):
    path = tmp_path / "numbers"
    numbers = range(0, 60000, 7)
    with open(path, "w+b") as file:
        place = file.tell()
        monkeypatch.delattr(os, "pread")
        monkeypatch.delattr(os, "pwrite")
        wrong = []

        def work(part: range) -> None:
            for number in part:
                machine.write_at(file.fileno(), number.to_bytes(7, "little"), number)
            wrong.extend(n for n in part if machine.read_at(file.fileno(), 7, n) != n.to_bytes(7, "little"))

        threads = [threading.Thread(target=work, args=(numbers[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == place  # who reads the file on does not notice
    assert path.read_bytes() == b"".join(number.to_bytes(7, "little") for number in numbers)


def test_a_file_that_may_not_be_written_is_made_durable_too(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "a").chmod(0o400)
    files.sync_file(tmp_path / "a")


def test_what_is_shared_is_not_removed(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"a")
    descriptor = machine.open_file(path)
    machine.share(descriptor)
    assert not machine.remove_unshared(path)
    assert path.exists()
    os.close(descriptor)
    assert machine.remove_unshared(path)
    assert not path.exists()
    assert machine.remove_unshared(path)


def test_peak_memory_is_counted_in_kibibytes_but_on_a_mac(monkeypatch):
    there = machine.peak_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.peak_memory() == pytest.approx(there / 1024, rel=0.5)


def test_pages_are_not_read_where_nothing_limits_them(monkeypatch):
    monkeypatch.setattr(machine, "HAS_LIMITS", False)
    extract = Extract(texts=("alt",), lazy=(), srcset=True, opt_outs=())
    with pytest.raises(UsageError, match="web pages are read on Linux and macOS"):
        Parser(extract, page_seconds=1.0, memory=1 << 29)


@pytest.mark.parametrize(
    ("load", "chosen", "expected"),
    [(3.0, {}, "passive"), (0.1, {}, None), (3.0, {"OMP_WAIT_POLICY": "active"}, "active")],
)
def test_threads_sleep_beside_busy_programs_unless_the_user_chose(load, chosen, expected):
    code = f"""
import os, sys
os.getloadavg = lambda: ({load}, 0, 0)
from diptych.cli import main
try:
    main(["--version"])
except SystemExit:
    assert "torch" not in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"))
"""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | chosen
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(expected)


def test_a_run_that_others_slow_down_says_so_once(monkeypatch):
    monkeypatch.setattr(machine, "count_cores", lambda: 2)
    for load in (1.0, 8.0):
        monkeypatch.setattr(machine, "busy_cores", lambda load=load: load)
        pace = Pace()
        notes = [pace.take(speed) for speed in [100.0] * 10 + [5.0] * 20]
        told = [note for note in notes if note]
        assert len(told) == (load > 3)
    assert "pairs/s, 100 before: other programs use these cores. Ctrl-C" in told[0]
