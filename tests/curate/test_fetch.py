import hashlib
import io
import itertools
import json
import re
import struct
import time
import zlib
from pathlib import Path

import fetching
import hostile_web
import pyarrow.parquet as pq
import pytest
from fetching import config_for, engine, fetch, serve, write_pairs
from PIL import Image

from diptych.curate.fetch.guard import Guard
from diptych.curate.fetch.ledger import Ledger
from diptych.curate.fetch.run import forget
from diptych.curate.fetch.worker import fetch_partition
from diptych.curate.rows import CANDIDATES
from diptych.errors import DownloadError, RunLockedError, UsageError
from diptych.stage.folder import read_manifest, read_rows


def rows_of(folder: Path) -> list[dict]:
    return [row for batch in read_rows(folder) for row in batch.to_pylist()]


def dropped_of(folder: Path) -> dict[str, str]:
    return {
        row["image_url"]: row["reason"]
        for path in sorted((folder / "dropped").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    }


def test_pictures_come_in_the_order_of_the_pairs_with_what_is_known_of_them(tmp_path):
    with serve() as server:
        urls = [server.url(i) for i in range(30)]
        folder = write_pairs(tmp_path / "in", [*urls[::-1], urls[3]], per_part=10)
        report = fetch(config_for(folder, tmp_path / "out", server))
        assert server.asked.total() == 31  # 30 pictures, once each, and robots.txt
    rows = rows_of(tmp_path / "out")
    assert [row["image_url"] for row in rows] == [*urls[::-1], urls[3]]
    assert all(row["image"] == fetching.draw(int(row["image_url"].split("/")[-1][:-4])) for row in rows)
    details = json.loads(rows[0]["details"])
    assert details.keys() == {"from", "sha256", "width", "height", "original_width", "original_height"}
    assert (details["width"], details["height"]) == (48, 40)
    assert report.outcomes == {"ok": 30}
    assert report.stage.kept == 31


def test_every_request_says_who_asks(tmp_path):
    with hostile_web.world() as world:
        hostile_web.fetch_all(tmp_path, [f"http://good.test:{world.port}/{i}" for i in range(3)], world)
        (agent,) = world.agents
    assert re.fullmatch(r"diptych(/[\d.]+\w*)? \(\+https://example\.org/crawler\)", agent)


def test_only_failures_are_asked_again_and_only_their_parts_made_anew(tmp_path):
    with serve() as server:
        urls = [server.url(i) for i in range(20)]
        folder = write_pairs(tmp_path / "in", urls, per_part=5)
        broken = True
        server.answer = lambda path, nth: (503, b"", {}) if path == "/7.jpg" and broken else None
        config = config_for(folder, tmp_path / "out", server, attempts=2)
        first = fetch(config)
        assert dropped_of(config.out) == {urls[7]: "http_503"}
        assert (first.stage.done, first.stage.found, server.asked["/7.jpg"]) == (4, 0, 2)
        broken = False
        second = fetch(config)
    assert (second.asked, second.stage.done, second.stage.found) == (1, 1, 3)
    assert second.outcomes == {"ok": 20}
    assert set(server.asked.values()) == {1, 3}  # each other picture once, over both runs
    assert second.stage.hash != first.stage.hash


def test_what_will_not_pass_is_asked_once_and_never_again(tmp_path):
    with serve() as server:
        server.answer = lambda path, nth: (404, b"", {}) if path == "/1.jpg" else None
        folder = write_pairs(tmp_path / "in", [server.url(i) for i in range(3)])
        config = config_for(folder, tmp_path / "out", server)
        fetch(config)
        again = fetch(config)
        assert server.asked["/1.jpg"] == 1
        assert (again.asked, again.stage.done) == (0, 0)
        everything = config_for(folder, tmp_path / "out", server, retry="failed")
        assert fetch(everything).asked == 1
        assert server.asked["/1.jpg"] == 2


def test_a_host_that_asks_for_a_pause_gets_it(tmp_path):
    with serve() as server:
        times = []

        def answer(path, nth):
            if path != "/robots.txt":
                times.append(time.monotonic())
            return (429, b"", {"Retry-After": "1"}) if path == "/0.jpg" and nth == 1 else None

        server.answer = answer
        folder = write_pairs(tmp_path / "in", [server.url(i) for i in range(3)])
        report = fetch(config_for(folder, tmp_path / "out", server, per_host=1))
    assert report.outcomes == {"ok": 3}
    assert max(b - a for a, b in itertools.pairwise(times)) > 0.95


def test_a_pause_that_is_too_long_is_left_to_a_later_run(tmp_path):
    with serve() as server:
        server.answer = lambda path, nth: (429, b"", {"Retry-After": "3600"}) if path == "/0.jpg" else None
        folder = write_pairs(tmp_path / "in", [server.url(i) for i in range(2)])
        config = config_for(folder, tmp_path / "out", server, max_wait=0.2)
        assert fetch(config).outcomes == {"http_429": 1, "ok": 1}
        assert fetch(config).asked == 0  # the hour is not over
    assert server.asked["/0.jpg"] == 1


def test_a_host_that_is_down_is_left_alone_after_a_few_tries(tmp_path):
    with serve() as server:
        place = server.place
    folder = write_pairs(tmp_path / "in", [f"http://{place}/{i}.jpg" for i in range(40)])
    config = config_for(folder, tmp_path / "out", server, dead_after=3, attempts=2, per_host=1, backoff=0.0)
    outcomes = fetch(config).outcomes
    assert outcomes["host_down"] >= 35
    assert outcomes.keys() == {"connect", "host_down"}


def test_robots_txt_is_read_once_and_its_delay_is_kept(tmp_path):
    robots = b"User-agent: *\nDisallow: /2.jpg\nCrawl-delay: 0.3\n"
    with serve() as server:
        times = []

        def answer(path, nth):
            times.append(time.monotonic())
            return (200, robots, {}) if path == "/robots.txt" else None

        server.answer = answer
        folder = write_pairs(tmp_path / "in", [server.url(i) for i in range(5)])
        config = config_for(folder, tmp_path / "out", server, per_host=1)
        assert fetch(config).outcomes == {"ok": 4, "robots": 1}
        fetch(config_for(write_pairs(tmp_path / "in2", [server.url(9)]), tmp_path / "out2", server))
        assert server.asked["/robots.txt"] == 2  # one for each ledger
    gaps = [b - a for a, b in itertools.pairwise(times[1:5])]
    assert min(gaps) > 0.25


def test_listed_pictures_are_never_written(tmp_path):
    listed = tmp_path / "listed.txt"
    listed.write_text(
        f"# two\n{hashlib.md5(fetching.draw(1)).hexdigest()}\n{hashlib.sha256(fetching.draw(2)).hexdigest()}"
    )
    with serve() as server:
        folder = write_pairs(tmp_path / "in", [server.url(i) for i in range(4)])
        config = config_for(folder, tmp_path / "out", server, known_hashes=(listed,))
        assert fetch(config).outcomes == {"known_hash": 2, "ok": 2}
    everything = b"".join(path.read_bytes() for path in config.out.rglob("*") if path.is_file())
    assert fetching.draw(0) in everything
    assert fetching.draw(1) not in everything
    assert fetching.draw(2) not in everything


def test_a_picture_too_large_to_decode_is_dropped_by_its_header(tmp_path):
    head = bytearray(io.BytesIO(_png((64, 64))).getvalue())
    head[16:24] = struct.pack(">II", 60_000, 60_000)
    head[29:33] = struct.pack(">I", zlib.crc32(head[12:29]))
    with serve() as server:
        server.answer = lambda path, nth: (200, bytes(head), {}) if path == "/0.jpg" else None
        folder = write_pairs(tmp_path / "in", [server.url(i) for i in range(2)])
        config = config_for(folder, tmp_path / "out", server)
        fetch(config)
    assert list(dropped_of(config.out).values()) == ["too_many_pixels"]


def _png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_without_an_address_are_counted(tmp_path):
    with serve() as server:
        folder = write_pairs(tmp_path / "in", [None, "", server.url(1)])
        config = config_for(folder, tmp_path / "out", server)
        assert fetch(config).stage.dropped == {"url": 2}


def test_several_processes_leave_the_same_files_as_one(tmp_path):
    with serve() as server:
        urls = [server.url(i) for i in range(40)]
        folder = write_pairs(tmp_path / "in", urls, per_part=20)
        hashes = set()
        for processes in (1, 2):
            out = tmp_path / f"out{processes}" / "fetch"
            hashes.add(fetch(config_for(folder, out, server, partitions=processes)).stage.hash)
    assert len(hashes) == 1
    with pytest.raises(UsageError, match="partitions"):
        fetch(config_for(folder, out, server, partitions=3))


def test_settings_that_would_mix_are_refused(tmp_path):
    with serve() as server:
        folder = write_pairs(tmp_path / "in", [server.url(1)])
        fetch(config_for(folder, tmp_path / "out", server))
        with pytest.raises(UsageError, match="begun with robots True, not False"):
            fetch(config_for(folder, tmp_path / "out", server, robots=False))


def test_two_fetches_into_one_folder_are_refused(tmp_path):
    with serve() as server:
        folder = write_pairs(tmp_path / "in", [server.url(1)])
        config = config_for(folder, tmp_path / "out", server)
        with Ledger(config.out / "ledger" / "0000"), pytest.raises(RunLockedError):
            fetch(config)


def test_killed_fetches_lose_nothing_and_ask_nothing_twice_but_what_was_under_way(tmp_path):
    pictures, kills, concurrency = 400, 3, 8
    with serve(seconds=0.01) as server:
        urls = [server.url(i) for i in range(pictures)]
        folder = write_pairs(tmp_path / "in", urls)
        fetch(config_for(folder, tmp_path / "whole" / "fetch", server, min_side=8))
        server.asked.clear()
        out = tmp_path / "killed" / "fetch"
        killed = fetching.kill_and_finish(folder, out, server, pictures, kills)
        asked = server.asked.copy()
    assert killed == kills
    assert len(asked) == pictures + 1
    assert asked.total() - len(asked) <= kills * (concurrency + 1)
    assert read_manifest(out).hash == read_manifest(tmp_path / "whole" / "fetch").hash
    assert [row["image_url"] for row in rows_of(out)] == urls


def test_the_schema_of_the_input_is_kept(tmp_path):
    with serve() as server:
        folder = write_pairs(tmp_path / "in", [server.url(1)])
        fetch(config_for(folder, tmp_path / "out", server))
    (batch,) = read_rows(tmp_path / "out")
    assert batch.schema.names == CANDIDATES.names
    assert engine is fetching.engine


def test_the_resolver_of_this_machine_is_asked_and_a_name_may_be_allowed(tmp_path):
    with serve() as server:
        port = server.server_address[1]
        urls = [f"http://localhost:{port}/1.jpg", "http://nobody.invalid/1.jpg"]
        folder = write_pairs(tmp_path / "in", urls)
        config = config_for(folder, tmp_path / "out", server, allow_host=(f"localhost:{port}",), attempts=1)
        assert fetch(config).outcomes == {"dns": 1, "ok": 1}
        other = config_for(folder, tmp_path / "out2", server, allow_host=(), ports=(80, port), attempts=1)
        assert fetch(other).outcomes == {"address": 1, "dns": 1}


def test_a_resolver_that_fails_for_most_names_stops_the_run(tmp_path):
    async def lookup(name: str) -> list[str]:
        raise OSError("no answer")

    config = config_for(tmp_path, tmp_path, None, allow_host=(), attempts=1)
    with Ledger(tmp_path / "ledger" / "0000") as ledger:
        ledger.add(f"http://host{i}.test/x" for i in range(600))
    with pytest.raises(DownloadError, match="500 of the last 500"):
        fetch_partition(config, 0, guard=Guard(lookup=lookup))
    with Ledger(tmp_path / "ledger" / "0000") as ledger:
        assert ledger.counts()["dns"] >= 500  # and they are tried again by the next run


def test_a_forgotten_picture_is_gone_and_never_asked_again(tmp_path):
    with serve() as server:
        folder = write_pairs(tmp_path / "in", [server.url(i) for i in range(4)], per_part=2)
        config = config_for(folder, tmp_path / "out", server, retry="failed")
        fetch(config)
        assert forget(config.out, [server.url(1), "http://never.test/x"]) == 1
        report = fetch(config)
    assert server.asked["/1.jpg"] == 1
    assert (report.stage.done, report.stage.dropped) == (1, {"deleted": 1})
    everything = b"".join(path.read_bytes() for path in config.out.rglob("*") if path.is_file())
    assert fetching.draw(0) in everything
    assert fetching.draw(1) not in everything
