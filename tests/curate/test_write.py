import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stages

from diptych.curate import delete, write
from diptych.curate.config import DeleteConfig, WriteConfig
from diptych.curate.rows import BALANCED
from diptych.errors import NotFoundError, ShardError, UsageError
from diptych.shards.dataset import load_dataset
from diptych.shards.tombstones import TOMBSTONES_FILE, read_tombstones
from diptych.stage import folder as parts
from diptych.stage.run import Engine, tasks_of


def fetched(work: Path) -> Path:
    stages.crawl(work)
    parent = parts.read_manifest(work / "crawl").hash
    Engine().run_stage(stages.Paint(), tasks_of(work / "crawl"), work / "fetch", {}, schema=BALANCED, parent=parent)
    return work / "fetch"


def config(work: Path, **changes) -> WriteConfig:
    values = {"folder": work / "fetch", "out": work / "shards", "samples_per_shard": 10, "shards_per_task": 2}
    return WriteConfig(**values | changes)


def run(config: WriteConfig, **options):
    return write.run(config, engine=Engine(**options))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names the process that held it."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*")) if path.is_file()}


def test_shards_hold_every_pair_once_in_an_order_of_their_own(tmp_path):
    fetched(tmp_path)
    report = run(config(tmp_path))
    assert (report.rows, report.kept, report.dropped) == (130, 130, {})
    dataset = load_dataset(tmp_path / "shards")
    assert dataset.sizes.tolist() == [10] * 13
    pairs = list(dataset.pairs)
    rows = [row for batch in parts.read_rows(tmp_path / "fetch") for row in batch.to_pylist()]
    assert {pair.key: (pair.caption, pair.image) for pair in pairs} == {
        row["key"]: (row["caption"], row["image"]) for row in rows
    }
    pages = [pair.caption.split()[1] for pair in pairs[:10]]
    assert len(set(pages)) > 2
    assert not (tmp_path / "shards/scatter").exists()


def test_a_sample_says_where_it_came_from(tmp_path):
    fetched(tmp_path)
    pq.write_table(pa.table({"id": [0, 1], "text": ["page", "a page"]}), tmp_path / "queries.parquet")
    run(config(tmp_path, queries=tmp_path / "queries.parquet"))
    pair = next(iter(load_dataset(tmp_path / "shards").pairs))
    name, number = pair.caption.split()[1:]
    assert pair.details["image_url"] == f"http://example.org/{name}/{number}.jpg"
    assert pair.details["page_url"] == "http://p/"
    assert pair.details["queries"] == ["page", "a page"]
    assert pair.details["query"] == "a page"
    assert 0 <= pair.details["draw"] < 1


@pytest.mark.parametrize("options", [{"processes": 1}, {"processes": 3}])
def test_any_number_of_processes_writes_the_same_shards(tmp_path, options):
    fetched(tmp_path)
    run(config(tmp_path))
    other = run(config(tmp_path, out=tmp_path / "again" / "shards"), **options)
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "again" / "shards")
    assert other.hash == parts.read_manifest(tmp_path / "shards").hash


def test_how_many_shards_a_task_makes_does_not_change_them(tmp_path):
    fetched(tmp_path)
    run(config(tmp_path))
    run(config(tmp_path, out=tmp_path / "other", shards_per_task=5))
    a, b = (load_dataset(tmp_path / name) for name in ("shards", "other"))
    assert a.content_hash == b.content_hash


def test_a_damaged_shard_is_made_again(tmp_path):
    fetched(tmp_path)
    run(config(tmp_path))
    before = bytes_of(tmp_path / "shards")
    (tmp_path / "shards/00003.tar").write_bytes(b"")
    report = run(config(tmp_path))
    assert (report.done, report.found) == (1, 6)
    assert bytes_of(tmp_path / "shards") == before


def test_pairs_that_cannot_be_samples_are_dropped_with_a_reason(tmp_path):
    stages.crawl(tmp_path)
    parent = parts.read_manifest(tmp_path / "crawl").hash
    no_picture = stages.Paint(picture=b"<html>")
    Engine().run_stage(no_picture, tasks_of(tmp_path / "crawl"), tmp_path / "fetch", {}, schema=BALANCED, parent=parent)
    with pytest.raises(UsageError, match=r"no pair was left to write.*not_a_picture.*130"):
        run(config(tmp_path))


def test_a_copy_of_a_pair_is_written_once(tmp_path):
    fetched(tmp_path)
    part = tmp_path / "fetch/part-00000.parquet"
    task = replace(tasks_of(tmp_path / "fetch")[0], inputs=(part, part))
    Engine().run_stage(stages.Paint(), [task], tmp_path / "double", {}, schema=BALANCED)
    report = run(config(tmp_path, folder=tmp_path / "double"))
    assert (report.kept, report.dropped) == (26, {"duplicate_key": 26})


@pytest.mark.parametrize(("content", "said"), [(b"a\n" + b"x" * (1 << 21), "line 2 has over"), (b"a\xff", "not UTF-8")])
def test_a_list_of_keys_that_is_none_is_refused(tmp_path, content, said):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UsageError, match=rf"list\.txt.*{said}"):
        delete.run(DeleteConfig(shards=tmp_path, file=tmp_path / "list.txt"))


def test_deleting_by_key_picture_and_page(tmp_path):
    fetched(tmp_path)
    run(config(tmp_path))
    pairs = list(load_dataset(tmp_path / "shards").pairs)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{pairs[2].key}\n\nhttp://nowhere/\n")
    before = load_dataset(tmp_path / "shards").content_hash
    report = delete.run(
        DeleteConfig(shards=tmp_path / "shards", key=(pairs[0].key,), url=(pairs[1].details["image_url"],), file=listed)
    )
    assert (report.deleted, report.before, report.not_found) == (3, 0, ("http://nowhere/",))
    after = load_dataset(tmp_path / "shards")
    assert [pair.key for pair in after.pairs] == [pair.key for pair in pairs[3:]]
    assert list(after.captions) == [pair.caption for pair in pairs[3:]]
    assert after.content_hash == before
    again = delete.run(DeleteConfig(shards=tmp_path / "shards", key=(pairs[0].key,)))
    assert (again.deleted, again.before) == (0, 3)
    delete.run(DeleteConfig(shards=tmp_path / "shards", url=("http://p/",)))
    with pytest.raises(ShardError, match="every sample"):
        load_dataset(tmp_path / "shards")


def test_compacting_takes_the_bytes_out(tmp_path):
    fetched(tmp_path)
    run(config(tmp_path))
    pairs = list(load_dataset(tmp_path / "shards").pairs)
    gone = [pairs[0], *pairs[20:30]]  # one of a shard, and a whole shard
    report = delete.run(DeleteConfig(shards=tmp_path / "shards", key=tuple(pair.key for pair in gone), compact=True))
    assert report.compacted is not None
    assert (report.compacted.samples, report.compacted.shards) == (11, 2)
    assert report.compacted.freed > 0
    after = load_dataset(tmp_path / "shards")
    kept = [pair for pair in pairs if pair not in gone]
    assert list(after.pairs) == kept
    everything = b"".join(bytes_of(tmp_path / "shards").values()) + b"".join(
        path.read_bytes() for path in (tmp_path / "shards/done").iterdir()
    )
    assert not any(pair.image in everything for pair in gone if pair.image)
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 12
    manifest = parts.read_manifest(tmp_path / "shards")
    assert (manifest.kept, manifest.dropped) == (119, {"deleted": 11})
    assert {name for name in manifest.files if name.endswith(".tar")} == {shard.path.name for shard in after.shards}
    assert read_tombstones(tmp_path / "shards") == {pair.key for pair in gone}


def test_what_was_deleted_does_not_come_back_when_the_shards_are_written_again(tmp_path):
    fetched(tmp_path)
    run(config(tmp_path))
    pairs = list(load_dataset(tmp_path / "shards").pairs)
    delete.run(DeleteConfig(shards=tmp_path / "shards", key=(pairs[0].key,), compact=True))
    report = run(config(tmp_path))
    assert (report.done, report.kept) == (0, 129)
    with pytest.raises(UsageError, match="for good"):
        run(config(tmp_path, seed=1))
    other = tmp_path / "other"
    other.mkdir()
    (other / TOMBSTONES_FILE).write_bytes((tmp_path / "shards" / TOMBSTONES_FILE).read_bytes())
    assert run(config(tmp_path, out=other)).dropped == {"deleted": 1}
    assert pairs[0].key not in {pair.key for pair in load_dataset(other).pairs}


def test_compacting_again_goes_on_from_what_a_killed_one_left(tmp_path):
    fetched(tmp_path)
    run(config(tmp_path))
    pairs = list(load_dataset(tmp_path / "shards").pairs)
    delete.run(DeleteConfig(shards=tmp_path / "shards", key=(pairs[0].key,)))
    (tmp_path / "shards/00000-1.tar").write_bytes(b"half of it")
    delete.run(DeleteConfig(shards=tmp_path / "shards", compact=True))
    delete.run(DeleteConfig(shards=tmp_path / "shards", key=(pairs[1].key,), compact=True))
    assert list(load_dataset(tmp_path / "shards").pairs) == pairs[2:]
    assert sorted(path.name for path in (tmp_path / "shards").glob("0000[01]*")) == [
        "00000-2.arrow", "00000-2.tar", "00001.arrow", "00001.tar",
    ]  # fmt: skip


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from diptych.curate import delete
from diptych.curate.config import DeleteConfig

start, work, keys = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3].split(","))
events = 0

def count(name, arguments, last):
    global events
    writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if name in ("os.rename", "os.remove", "os.mkdir") or writes:
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)

for last in range(1, 1000):
    folder = work / f"{last:03d}" / "shards"
    shutil.copytree(start, folder)
    child = os.fork()
    if not child:
        sys.addaudithook(lambda name, arguments: count(name, arguments, last))
        delete.run(DeleteConfig(shards=folder, key=keys, compact=True))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
        break
"""


@pytest.mark.slow
def test_compacting_may_be_killed_anywhere(tmp_path):
    fetched(tmp_path)
    run(config(tmp_path))
    pairs = list(load_dataset(tmp_path / "shards").pairs)
    gone = [pairs[0], pairs[45], *pairs[20:30]]
    keys = [pair.key for pair in gone]
    delete.run(DeleteConfig(shards=tmp_path / "shards", key=tuple(keys[:2])))
    (tmp_path / "killed").mkdir()
    arguments = [str(tmp_path / "shards"), str(tmp_path / "killed"), ",".join(keys)]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True)
    *killed, whole = sorted((tmp_path / "killed").iterdir())
    assert len(killed) > 20
    kept = [pair for pair in pairs if pair not in gone]
    for work in killed:
        live = list(load_dataset(work / "shards").pairs)  # before or after the tombstones were written
        assert live in (kept, [pair for pair in pairs if pair.key not in keys[:2]]), work
        shutil.copytree(work / "shards", work / "again" / "shards")
        shutil.copytree(tmp_path / "fetch", work / "again" / "fetch")
        run(config(work / "again"))
        assert {pair.key for pair in load_dataset(work / "again" / "shards").pairs} == {pair.key for pair in live}, work
        delete.run(DeleteConfig(shards=work / "shards", key=tuple(keys), compact=True))
        assert bytes_of(work / "shards") == bytes_of(whole / "shards"), work


def test_wrong_use_of_delete_is_told(tmp_path):
    with pytest.raises(UsageError, match="nothing to delete was named"):
        DeleteConfig(shards=tmp_path)
    with pytest.raises(NotFoundError, match="no such file"):
        delete.run(DeleteConfig(shards=tmp_path, file=tmp_path / "none"))
    fetched(tmp_path)
    run(config(tmp_path))
    (tmp_path / "shards/dataset.json").unlink()
    with pytest.raises(UsageError, match="shards of other origin are not changed"):
        delete.run(DeleteConfig(shards=tmp_path / "shards", compact=True))
