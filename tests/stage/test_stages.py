import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stages

from diptych import files
from diptych.curate.rows import CANDIDATES, draw, key_of, with_reason
from diptych.errors import NotFoundError, RunLockedError, ShardError, TaskLostError, UsageError
from diptych.stage import folder as parts
from diptych.stage.run import Engine, tasks_of

FOLDERS = [str(Path(__file__).parent), str(Path(stages.__file__).parent)]


def run_half(stage, tasks, folder: Path, *, parent=None, config=None, **options):
    config = config or {"rule": "digit"}
    return Engine(**options).run_stage(stage, tasks, folder, config, schema=CANDIDATES, parent=parent)


def half(work: Path, stage: stages.Half | None = None, **options):
    parent = parts.read_manifest(work / "crawl").hash
    return run_half(stage or stages.Half(), tasks_of(work / "crawl"), work / "half", parent=parent, **options)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names the process that held it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, bytes]:
    work = tmp_path_factory.mktemp("straight")
    stages.crawl(work)
    half(work)
    return tree(work)


def test_every_row_is_kept_or_dropped_with_a_reason(tmp_path):
    stages.crawl(tmp_path)
    report = half(tmp_path)
    assert (report.stage, report.rows) == ("half", 5 * 26)
    assert report.kept + sum(report.dropped.values()) == report.rows
    kept = [row for batch in parts.read_rows(tmp_path / "half") for row in batch.to_pylist()]
    dropped = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "half/dropped").glob("*"))])
    assert len(kept) == report.kept
    assert all(row["key"][0].isdigit() for row in kept)
    assert {"letter": len(dropped)} == report.dropped
    assert set(dropped["reason"].to_pylist()) == {"letter"}
    assert all(url.startswith("http://example.org/") for url in dropped["image_url"].to_pylist())


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_leaves_the_same_bytes(tmp_path, straight, processes):
    stages.crawl(tmp_path, processes=processes)
    half(tmp_path, processes=processes)
    assert tree(tmp_path) == straight


def test_what_is_done_is_not_done_again(tmp_path, straight):
    stages.crawl(tmp_path)
    half(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "half").glob("*.parquet")}
    report = half(tmp_path, processes=2)
    assert (report.done, report.found) == (0, 5)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "half").glob("*.parquet")} == times
    assert tree(tmp_path) == straight


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_part_is_noticed_and_done_again(tmp_path, straight, damage):
    stages.crawl(tmp_path)
    half(tmp_path)
    part = tmp_path / "half" / "part-00002.parquet"
    data = bytearray(part.read_bytes())
    if damage == "flip":
        data[200] ^= 1  # inside the first page
        part.write_bytes(data)
        with pytest.raises(ShardError, match=r"part-00002.*damaged.*run the stage that wrote it again"):
            list(parts.read_rows(tmp_path / "half"))
    elif damage == "cut":
        part.write_bytes(data[:-10])
    else:
        part.unlink()
    report = half(tmp_path)
    assert (report.done, report.found) == (1, 4)
    assert tree(tmp_path) == straight


def test_a_part_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "part-00000.parquet")
    with pytest.raises(UsageError, match="is a pipe"):
        next(parts.read_part(tmp_path / "part-00000.parquet"))


def test_a_damaged_or_foreign_record_counts_as_not_done(tmp_path, straight):
    stages.crawl(tmp_path)
    half(tmp_path)
    (tmp_path / "half/done/part-00001.json").write_text("{")
    record = json.loads((tmp_path / "half/done/part-00003.json").read_text())
    outside = {**record, "files": {"../crawl/part-00000.parquet": "0" * 64}}
    (tmp_path / "half/done/part-00003.json").write_text(json.dumps(outside))
    for number, changes in ((0, {"rows": "5"}), (2, {"kept": record["kept"] + 1}), (4, {"files": {"x": None}})):
        path = tmp_path / f"half/done/part-{number:05d}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert half(tmp_path).done == 5
    assert tree(tmp_path) == straight


def test_a_place_that_is_a_file_is_refused(tmp_path):
    stages.crawl(tmp_path)
    (tmp_path / "half").write_text("")
    with pytest.raises(UsageError, match="half: it is a file"):
        half(tmp_path)


def test_other_settings_are_refused_or_make_the_folder_anew(tmp_path):
    stages.crawl(tmp_path)
    half(tmp_path)
    other = partial(half, tmp_path, config={"rule": "letter"})
    with pytest.raises(
        UsageError,
        match=r"begun with other settings: there rule is digit, here letter; .* --redo",
    ):
        other()
    report = other(redo=True)
    assert (report.done, report.found) == (5, 0)
    assert (other().done, other().found) == (0, 5)


def test_parts_that_no_task_makes_any_more_go_with_redo(tmp_path):
    stages.crawl(tmp_path)
    half(tmp_path)
    tasks = tasks_of(tmp_path / "crawl")[:3]
    parent = parts.read_manifest(tmp_path / "crawl").hash
    with pytest.raises(UsageError, match="2 of its parts"):
        run_half(stages.Half(), tasks, tmp_path / "half", parent=parent)
    run_half(stages.Half(), tasks, tmp_path / "half", parent=parent, redo=True)
    assert len(list((tmp_path / "half").glob("*.parquet"))) == 3


def test_a_changed_input_is_other_input(tmp_path):
    stages.crawl(tmp_path)
    half(tmp_path)
    stages.crawl(tmp_path, files=6, redo=True)
    with pytest.raises(UsageError, match="--redo"):
        half(tmp_path)


def test_a_process_that_dies_costs_a_second_try(tmp_path, straight):
    stages.crawl(tmp_path)
    half(tmp_path, stages.Half(die_once=str(tmp_path / "died")), processes=2)
    assert (tmp_path / "died").exists()
    (tmp_path / "died").unlink()
    assert tree(tmp_path) == straight


def test_a_task_that_always_dies_is_named_and_the_others_can_go_on(tmp_path, straight):
    stages.crawl(tmp_path)
    with pytest.raises(TaskLostError, match=r"part-00003 of half ended its process 2 times \(exit code -9\)"):
        half(tmp_path, stages.Half(die_at="page3"), processes=2)
    report = half(tmp_path, processes=2)
    assert report.found >= 1
    assert tree(tmp_path) == straight


def test_tasks_that_are_handed_out_together_are_tried_again_together(tmp_path, straight):
    stages.crawl(tmp_path)
    with pytest.raises(
        TaskLostError, match=r"part-00003 to part-00004 of half ended its process 2 times .*-9\).*part-00004"
    ):
        half(tmp_path, stages.Half(die_at="page3"), processes=1, batches=lambda tasks: [tasks[:3], tasks[3:]])
    assert half(tmp_path, stages.Half(die_once=str(tmp_path / "died")), processes=2).found == 3
    (tmp_path / "died").unlink()
    assert tree(tmp_path) == straight


@dataclass(frozen=True)
class Faulty:
    how: str

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if self.how == "raise":
                raise RuntimeError("no such luck")
            if self.how == "columns":
                yield batch
            else:
                yield with_reason(batch, [None] * len(batch))[1:]


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("raise", RuntimeError, "no such luck"),
        ("columns", ValueError, "and not, as it promised"),
        ("rows", ValueError, "was given 26 rows and gave back 25"),
    ],
)
def test_a_faulty_stage_is_told_with_the_task(tmp_path, processes, how, kind, message):
    stages.crawl(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        half(tmp_path, Faulty(how), processes=processes)
    assert "part-0000" in caught.value.__notes__[0]
    with pytest.raises(NotFoundError, match="is not finished"):
        parts.read_manifest(tmp_path / "half")


def test_processes_end_with_a_run_that_is_killed_in_the_middle_of_a_task(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=FOLDERS, seconds=60))
    (tmp_path / "work").mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "work")], start_new_session=True)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "work").glob("half/.part-*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while _members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _members(process.pid)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
import stages
from test_stages import half
if __name__ == "__main__":
    work = Path(sys.argv[1])
    stages.crawl(work)
    half(work, stages.Half(seconds={seconds}), processes=2)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, straight):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=FOLDERS, seconds=0.3))
    work = tmp_path / "work"
    work.mkdir()
    kills = 0
    for moment in range(40):
        process = subprocess.Popen([sys.executable, str(script), str(work)], start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(0.35 + 0.5 * draw(0, moment) + 0.08 * moment) == 0
            break
        os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
        process.wait()
        kills += 1
    assert kills >= 3
    deadline = time.monotonic() + 10
    while _members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _members(process.pid)
    assert tree(work) == straight


def _members(group: int) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(status.parent.name)
    return found


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    stages.crawl(tmp_path)
    (tmp_path / "half").mkdir()
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    with files.hold_folder(tmp_path / "half"):
        for _ in range(2):  # who is refused leaves the holder's name
            with pytest.raises(RunLockedError, match=rf"half is in use by another process \({holder}\)"):
                half(tmp_path)


def test_a_difference_is_named_with_both_values_however_deep_it_lies():
    then = {"limit": 3, "list": {"file": "a.txt", "sha256": "0"}, "kinds": ["a"]}
    assert parts.find_difference(then, {**then}) is None
    assert parts.find_difference(then, {**then, "limit": 4}) == "there limit is 3, here 4"
    other = {**then, "list": {"file": "a.txt", "sha256": "1"}}
    assert parts.find_difference(then, other) == "there list.sha256 is 0, here 1"
    assert parts.find_difference(then, {**then, "new": True}) == "there new is None, here True"


def test_a_folder_that_was_begun_says_with_what_and_is_not_read(tmp_path):
    stages.crawl(tmp_path)
    with pytest.raises(RuntimeError, match="no such luck"):
        half(tmp_path, Faulty("raise"))
    begun = parts.read_begun(tmp_path / "half")
    assert begun is not None
    assert (begun["stage"], begun["config"]) == ("half", {"rule": "digit"})
    with pytest.raises(NotFoundError, match="is not finished"):
        tasks_of(tmp_path / "half")


def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path):
    for name in ("../thesis.parquet", "/etc/passwd", "a/../../b"):
        done = parts.TaskRecord(fingerprint="", rows=0, kept=0, dropped={}, files={name: "0"})
        parts.write_manifest(tmp_path, stage="crawl", config={}, parent=None, done=[done])
        with pytest.raises(ShardError, match="is not in its folder"):
            parts.read_manifest(tmp_path)


def test_a_manifest_that_was_changed_or_is_not_there_is_told(tmp_path):
    stages.crawl(tmp_path)
    path = tmp_path / "crawl/manifest.json"
    path.write_text(path.read_text().replace('"kept": 130', '"kept": 131'))
    with pytest.raises(ShardError, match="was changed after it was written"):
        parts.read_manifest(tmp_path / "crawl")
    path.write_text("[]")
    with pytest.raises(ShardError, match="is damaged"):
        parts.read_manifest(tmp_path / "crawl")
    path.unlink()
    with pytest.raises(NotFoundError, match="holds no finished stage"):
        parts.read_manifest(tmp_path / "crawl")


def test_settings_in_a_manifest_mean_the_same_on_another_machine(tmp_path):
    stages.crawl(tmp_path)
    (tmp_path / "list.txt").write_text("a list")
    config = {"out": tmp_path / "half", "list": tmp_path / "list.txt", "from": (tmp_path / "crawl",), "limit": 3}
    described = parts.describe_config(config, tmp_path / "half")
    assert described == {
        "list": {"file": "list.txt", "sha256": hashlib.sha256(b"a list").hexdigest()},
        "from": [{"folder": "crawl", "hash": parts.read_manifest(tmp_path / "crawl").hash}],
        "limit": 3,
    }
    assert str(tmp_path) not in json.dumps(described)


def test_nothing_to_do_and_missing_inputs_are_told(tmp_path):
    with pytest.raises(UsageError, match="nothing to do"):
        run_half(stages.Half(), [], tmp_path / "half")
    stages.crawl(tmp_path)
    tasks = tasks_of(tmp_path / "crawl")
    (tmp_path / "crawl/part-00000.parquet").unlink()
    with pytest.raises(NotFoundError, match="no such file"):
        run_half(stages.Half(), tasks, tmp_path / "half")


def test_ray_leaves_the_same_bytes_and_names_a_task_that_dies(tmp_path, straight):
    pytest.importorskip("ray", reason="needs ray")
    script = tmp_path / "script.py"
    script.write_text(RAY.format(tests=FOLDERS))
    work = tmp_path / "work"
    work.mkdir()
    result = subprocess.run([sys.executable, str(script), str(work)], capture_output=True, text=True, check=False)
    assert "part-00003 of half ended its process 2 times" in result.stdout, result.stderr
    assert tree(work) == straight


RAY = """
import os
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
import stages
from diptych import files
from diptych.errors import TaskLostError
from test_stages import half
if __name__ == "__main__":
    work = Path(sys.argv[1])
    stages.crawl(work, processes=2, kind="ray")
    try:
        half(work, stages.Half(die_at="page3"), processes=2, kind="ray")
    except TaskLostError as error:
        print(error)
    half(work, processes=2, kind="ray")
"""


def test_draws_and_keys_depend_on_their_arguments_alone():
    assert draw(1, "a", 2) == draw(1, "a", 2) != draw(2, "a", 2)
    assert 0 <= min(draw(0, i) for i in range(1000)) < 0.01 < 0.99 < max(draw(0, i) for i in range(1000)) < 1
    assert key_of("http://a/1.jpg", "a cat") == key_of("http://a/1.jpg", "a cat") != key_of("http://a/1.jpg", "a dog")
    assert len(key_of("", "")) == 32
