import os
import subprocess
import sys
import time
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import server
import torch

from diptych import files
from diptych.config import from_dict, to_dict
from diptych.errors import NotFoundError, ShardError, UsageError
from diptych.shards import cache, order, remote
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.loader import Batch, Loader
from diptych.train import loop
from samples import train_config, write_samples

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/shards"]
from pathlib import Path
from test_remote import build, take
print([batch.keys for batch in take(build({url!r}, Path({cache!r}), workers=2), {count})])
"""


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption), sum(map(ord, caption))] for caption in captions])


def build(place: str | Path, cache: Path, **config) -> Loader:
    source = SourceConfig(path=place) if isinstance(place, Path) else SourceConfig(url=place)
    return Loader([source], LoaderConfig(**{"batch_size": 8, "workers": 0, "cache": cache} | config), 24, tokenize)


def take(loader: Loader, count: int) -> list[Batch]:
    with closing(iter(loader)) as batches:
        return list(islice(batches, count))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x.keys, x.pictures, x.position, x.skipped) == (y.keys, y.pictures, y.position, y.skipped)
        assert torch.equal(x.image, y.image)
        assert torch.equal(x.text, y.text)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("remote") / "data", count=64, samples_per_shard=8)


@pytest.fixture
def http(data):
    with server.serve(data) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cache, "DELAYS", (0.01, 0.02, 0.04))


def small_blocks(monkeypatch, shards: int = 2) -> None:
    monkeypatch.setattr(order, "BLOCK_SHARDS", shards)
    monkeypatch.setattr(remote, "BLOCK_SHARDS", shards)


def tars(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tar"))


def bytes_of_tars(folder: Path) -> int:
    total = 0
    for tar in tars(folder):
        with suppress(FileNotFoundError):  # removed meanwhile
            total += tar.stat().st_size
    return total


def tar_requests(http: server.Server) -> dict[str, int]:
    return {name: count for name, count in http.asked.items() if name.endswith(".tar")}


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("shards", [2, 64])
def test_batches_are_those_of_the_local_folder(data, http, tmp_path, monkeypatch, workers, shards):
    small_blocks(monkeypatch, shards)
    assert_same(take(build(http.url, tmp_path, workers=workers), 20), take(build(data, tmp_path), 20))
    assert set(tar_requests(http).values()) == {1}


@pytest.mark.parametrize("kind", ["range", "memory", "file", "one"])
def test_foreign_tars_are_indexed_when_they_are_first_named(data, http, tmp_path, kind):
    plain = tmp_path / "plain"
    plain.mkdir()
    for shard in sorted(data.glob("*.tar"))[: 1 if kind == "one" else None]:
        (plain / shard.name).write_bytes(shard.read_bytes())
    if kind == "memory":
        fsspec.filesystem("memory").put(f"{plain}/", "/bucket/", recursive=True)
    http.folder = plain
    url = {
        "range": f"{http.url}/{{00000..00007}}.tar",
        "memory": "memory://bucket",
        "file": f"file://{plain}",
        "one": f"{http.url}/00000.tar",
    }[kind]
    count = 1 if kind == "one" else 16
    assert_same(take(build(url, tmp_path / "cache"), count), take(build(plain, tmp_path), count))
    before = tar_requests(http)
    take(build(url, tmp_path / "cache"), count)
    assert tar_requests(http) == before


def test_the_next_start_finds_what_is_here(http, tmp_path):
    first = take(build(http.url, tmp_path), 8)
    http.asked.clear()
    assert_same(take(build(http.url, tmp_path), 8), first)
    assert dict(http.asked) == {"dataset.json": 1}


def short(body: bytes) -> tuple[int, bytes, float]:
    return 200, body[: len(body) // 2], 0.0


def wrong(body: bytes) -> tuple[int, bytes, float]:
    return 200, body[:700] + bytes([body[700] ^ 1]) + body[701:], 0.0


@pytest.mark.parametrize("fault", [short, wrong, lambda body: (500, body, 0.0)])
def test_a_download_that_failed_twice_is_tried_again(data, http, tmp_path, fault):
    http.fault = lambda name, nth, body: fault(body) if name.endswith("3.tar") and nth < 3 else None
    assert_same(take(build(http.url, tmp_path), 8), take(build(data, tmp_path), 8))
    assert http.asked["00003.tar"] == 3


@pytest.mark.parametrize(("fault", "reason"), [
    (wrong, "is not the bytes that were indexed"),
    (short, "ClientPayloadError"),
    (lambda body: (500, body, 0.0), "500"),
])  # fmt: skip
def test_a_download_that_fails_for_good_ends_with_url_and_reason_and_the_next_start_goes_on(
    data, http, tmp_path, fault, reason
):
    http.fault = lambda name, nth, body: fault(body) if name.endswith("3.tar") else None
    with pytest.raises(ShardError, match=rf"http://.*/00003\.tar could not be fetched in 4 tries.*{reason}"):
        take(build(http.url, tmp_path), 8)
    assert not list(tmp_path.rglob("00003.tar"))
    assert not list(tmp_path.rglob("*.part"))
    here = len(tars(tmp_path))
    http.fault = lambda name, nth, body: None
    http.asked.clear()
    assert_same(take(build(http.url, tmp_path), 8), take(build(data, tmp_path), 8))
    assert len(tar_requests(http)) <= 8 - here


@pytest.mark.parametrize("workers", [0, 3])
def test_a_small_cache_holds_its_limit_and_gives_the_same(data, http, tmp_path, monkeypatch, workers):
    small_blocks(monkeypatch)
    held = 6 if workers else 4  # three batches under way can be of three blocks
    limit = held * max(shard.stat().st_size for shard in data.glob("*.tar"))
    loader = build(http.url, tmp_path, cache_bytes=limit, workers=workers)
    expected = take(build(data, tmp_path), 30)
    with closing(iter(loader)) as batches:
        for batch, right in zip(batches, expected, strict=False):
            assert_same([batch], [right])
            assert bytes_of_tars(tmp_path) <= limit
    assert len(tars(tmp_path)) <= held
    assert max(tar_requests(http).values()) > 1  # epochs came again, and what was removed was fetched again


def test_a_cache_too_small_for_a_block_is_refused_with_the_number_needed(data, http, tmp_path):
    needed = sum(shard.stat().st_size for shard in data.glob("*.tar"))
    with pytest.raises(UsageError, match=f"takes up to {needed} bytes; use --cache-bytes {2 * needed}"):
        build(http.url, tmp_path, cache_bytes=needed - 1)


def start(url: str, folder: Path, count: int = 8) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), url=url, cache=str(folder), count=count)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_fetch_each_shard_once(data, http, tmp_path):
    http.fault = lambda name, nth, body: (200, body, 0.2) if name.endswith(".tar") else None
    both = [start(http.url, tmp_path) for _ in range(2)]
    expected = f"{[batch.keys for batch in take(build(data, tmp_path), 8)]}\n"
    assert [process.communicate(timeout=60)[0] for process in both] == [expected, expected]
    assert set(tar_requests(http).values()) == {1}


def test_a_process_killed_while_it_fetches_leaves_nothing_that_is_trusted(data, http, tmp_path):
    http.fault = lambda name, nth, body: (200, body, 60.0) if name.endswith("3.tar") else None
    process = start(http.url, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("00003.part")) or len(tars(tmp_path)) < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert list(tmp_path.rglob("00003.part"))
    assert not list(tmp_path.rglob("00003.tar"))
    http.fault = lambda name, nth, body: None
    http.asked.clear()
    assert_same(take(build(http.url, tmp_path), 8), take(build(data, tmp_path), 8))
    assert tar_requests(http) == {"00003.tar": 1}


def test_a_shard_in_the_cache_that_was_cut_is_fetched_again(data, http, tmp_path):
    take(build(http.url, tmp_path), 8)
    (cut,) = tmp_path.rglob("00002.tar")
    os.truncate(cut, 5000)
    assert_same(take(build(http.url, tmp_path), 8), take(build(data, tmp_path), 8))
    assert http.asked["00002.tar"] == 2


def test_waiting_for_the_network_is_data_wait(data, http, tmp_path):
    http.fault = lambda name, nth, body: (200, body, 0.7) if name.endswith(".tar") else None
    config = train_config(data, tmp_path / "run", steps=3)
    source = SourceConfig(url=http.url)
    loader = LoaderConfig(batch_size=16, workers=1, cache=tmp_path / "cache")
    reports = []
    changed = {"data": (source,), "loader": loader}
    loop.run(type(config)(**{**vars(config), **changed}), on_step=reports.append)
    assert reports[0].data_wait > 0.5


def test_what_goes_wrong_at_an_address_is_told_without_its_secrets(caplog):
    """As HTTP's client names the address that it asked."""

    def ask() -> None:
        raise OSError("500, message='Error', url='http://host/x?sig=HIDDEN'")

    with pytest.raises(ShardError, match="500") as told:
        cache.with_retries("http://host/x?sig=HIDDEN", ask)
    assert "HIDDEN" not in str(told.value) + caplog.text


def test_who_refuses_connections_is_given_up_before_anything_was_done(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "DELAYS", (0.01, 0.02, 0.03, 0.04, 60.0))
    with pytest.raises(ShardError, match=r"http://127\.0\.0\.1:1/x could not be fetched in 5 tries"):
        build("http://127.0.0.1:1/x", tmp_path)
    assert "trying again for 0.1 s" in caplog.messages[0]
    assert len(caplog.messages) == 4


def test_nothing_at_a_url_is_said(http, tmp_path):
    with pytest.raises(NotFoundError):
        build(f"{http.url}/missing.tar", tmp_path)
    with pytest.raises(UsageError, match="nosuch"):
        build("nosuch://bucket/shards", tmp_path)


@pytest.mark.parametrize(("text", "url", "weight"), [
    ("s3://bucket//a/b", "s3://bucket//a/b", 1.0),
    ("s3://bucket/a@0.5", "s3://bucket/a", 0.5),
    ("https://user@host/{00..09}.tar", "https://user@host/{00..09}.tar", 1.0),
])  # fmt: skip
def test_a_url_survives_the_config(text, url, weight):
    source = SourceConfig.parse(text)
    assert (source.url, source.path, source.weight) == (url, None, weight)
    assert from_dict(SourceConfig, to_dict(source)) == source


def test_a_stored_config_of_a_path_is_read_as_before():
    assert from_dict(SourceConfig, {"path": "a/b", "weight": 2.0}) == SourceConfig(path=Path("a/b"), weight=2.0)
    assert SourceConfig.parse("a/b@2") == SourceConfig(path=Path("a/b"), weight=2.0)


def test_ranges_are_written_out():
    assert files.expand_range("x/{08..10}.tar") == ["x/08.tar", "x/09.tar", "x/10.tar"]
    assert files.expand_range("x/{0..1}/{0..1}.tar") == ["x/0/0.tar", "x/0/1.tar", "x/1/0.tar", "x/1/1.tar"]
    with pytest.raises(UsageError, match="empty"):
        files.expand_range("x/{3..1}.tar")
    with pytest.raises(UsageError, match="stands for 1,000,000,000,000 files, at most 1,000,000"):
        files.expand_range("x/{0..999999}/{0..999999}.tar")
    assert files.expand_range(f"x/{{0..{'9' * 5000}}}.tar") == [f"x/{{0..{'9' * 5000}}}.tar"]  # no number of any file
