import hashlib
import os

import pytest

from diptych.curate.fetch import ledger as room
from diptych.curate.fetch.ledger import Ledger, Reader, partition_of
from diptych.errors import RunLockedError, ShardError


def store(ledger: Ledger, url: str, data: bytes, **changes) -> None:
    ledger.store(url, data, sha256=hashlib.sha256(data).hexdigest(), **({"final_url": None, "tries": 1} | changes))


def folder_of(path):
    return path / "0000"


def test_what_was_stored_is_read_back(tmp_path):
    with Ledger(folder_of(tmp_path)) as ledger:
        ledger.add(["http://a/1", "http://a/2", "http://b/3", "http://b/4"])
        store(ledger, "http://a/1", b"one", final_url="http://c/1")
        store(ledger, "http://a/2", b"two and more")
        ledger.fail("http://b/3", "http_404", detail="gone", tries=1)
        assert ledger.counts() == {"ok": 2, "http_404": 1, "": 1}
    with Reader(tmp_path, 1) as reader:
        one, two = reader.find("http://a/1"), reader.find("http://a/2")
        assert one is not None
        assert two is not None
        assert (reader.read("http://a/1", one), one.final_url) == (b"one", "http://c/1")
        assert reader.read("http://a/2", two) == b"two and more"
        failed = reader.find("http://b/3")
        assert failed is not None
        assert failed.outcome == "http_404"
        assert reader.find("http://b/4") is None
        assert reader.find("http://never/5") is None


def test_only_what_is_open_is_given_and_failures_as_asked(tmp_path):
    with Ledger(folder_of(tmp_path)) as ledger:
        ledger.add(f"http://a/{i}" for i in range(6))
        store(ledger, "http://a/0", b"x")
        for i, reason in enumerate(("http_404", "http_503", "timeout", "http_429"), 1):
            ledger.fail(f"http://a/{i}", reason, detail="", tries=1, again_at=1000.0 if i == 4 else None)
        assert list(ledger.iter_open()) == ["http://a/5"]
        assert sorted(ledger.iter_open("transient", now=999.0)) == [f"http://a/{i}" for i in (2, 3, 5)]
        assert sorted(ledger.iter_open("transient", now=1001.0)) == [f"http://a/{i}" for i in (2, 3, 4, 5)]
        assert sorted(ledger.iter_open("failed", now=1001.0)) == [f"http://a/{i}" for i in (1, 2, 3, 4, 5)]


def test_planning_again_changes_nothing(tmp_path):
    with Ledger(folder_of(tmp_path)) as ledger:
        ledger.add(["http://a/1"])
        store(ledger, "http://a/1", b"x")
        ledger.add(["http://a/1", "http://a/2"])
        assert ledger.counts() == {"ok": 1, "": 1}


def test_more_addresses_than_a_page_are_each_given_once(tmp_path):
    urls = [f"http://host{i % 7}/{i}" for i in range(2500)]
    with Ledger(folder_of(tmp_path)) as ledger:
        ledger.add(urls)
        given = list(ledger.iter_open())
    assert sorted(given) == sorted(urls)
    assert len({url.split("/")[2] for url in given[:50]}) == 7  # hosts are mixed


def test_every_opening_has_packs_of_its_own_and_packs_are_closed_when_full(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PACK_BYTES", 10)
    for run in range(2):
        with Ledger(folder_of(tmp_path)) as ledger:
            ledger.add(f"http://a/{run}{i}" for i in range(3))
            for i in range(3):
                store(ledger, f"http://a/{run}{i}", bytes([65 + run * 3 + i]) * 8)
    assert [path.stat().st_size for path in sorted(folder_of(tmp_path).glob("*.pack"))] == [16, 8, 16, 8]
    with Reader(tmp_path, 1) as reader:
        for run in range(2):
            for i in range(3):
                entry = reader.find(f"http://a/{run}{i}")
                assert entry is not None
                assert reader.read(f"http://a/{run}{i}", entry) == bytes([65 + run * 3 + i]) * 8


def test_bytes_that_a_loss_of_power_took_are_open_again(tmp_path):
    """The rows are there, the end of the pack is not: as a file system may leave it."""
    with Ledger(folder_of(tmp_path)) as ledger:
        ledger.add(["http://a/1", "http://a/2"])
        store(ledger, "http://a/1", b"a" * 100)
        ledger.sync()
        store(ledger, "http://a/2", b"b" * 100)
        pack = next(folder_of(tmp_path).glob("*.pack"))
        before = ledger._db.execute("SELECT pack, start FROM synced").fetchone()
    with Ledger(folder_of(tmp_path)) as ledger:
        ledger._db.execute("REPLACE INTO synced VALUES (1, ?, ?)", before)  # as if it had not been closed
    os.truncate(pack, 150)
    with Ledger(folder_of(tmp_path)) as ledger:
        assert list(ledger.iter_open()) == ["http://a/2"]
        assert ledger.counts() == {"ok": 1, "": 1}


def test_damaged_bytes_are_noticed(tmp_path):
    with Ledger(folder_of(tmp_path)) as ledger:
        ledger.add(["http://a/1"])
        store(ledger, "http://a/1", b"a" * 100)
    pack = next(folder_of(tmp_path).glob("*.pack"))
    pack.write_bytes(b"a" * 99 + b"x")
    with Reader(tmp_path, 1) as reader:
        entry = reader.find("http://a/1")
        assert entry is not None
        assert reader.read("http://a/1", entry) is None


def test_one_writer_at_a_time(tmp_path):
    with Ledger(folder_of(tmp_path)), pytest.raises(RunLockedError, match="another process"):
        Ledger(folder_of(tmp_path))


def test_a_robots_txt_is_kept_for_its_time(tmp_path):
    with Ledger(folder_of(tmp_path)) as ledger:
        assert ledger.robots("http://a", 60.0) is None
        ledger.keep_robots("http://a", "")
        assert ledger.robots("http://a", 60.0) == ""
        assert ledger.robots("http://a", 0.0) is None


def test_all_addresses_of_a_host_are_in_one_partition():
    urls = [f"http://host{i}.test:80/{k}" for i in range(50) for k in range(3)]
    places = {url: partition_of(url, 8) for url in urls}
    assert all(
        places[f"http://host{i}.test:80/0"] == places[f"http://host{i}.test:80/{k}"] for i in range(50) for k in (1, 2)
    )
    assert len(set(places.values())) == 8
    assert partition_of("http://[broken", 8) in range(8)


def test_a_ledger_that_is_no_database_is_refused_in_one_line(tmp_path):
    folder = folder_of(tmp_path)
    with Ledger(folder):
        pass
    (folder / "ledger.sqlite").write_bytes(b"rubbish" * 1000)
    for ending in ("-wal", "-shm"):
        (folder / f"ledger.sqlite{ending}").unlink(missing_ok=True)
    with pytest.raises(ShardError, match="is damaged"):
        Ledger(folder).__enter__()
