import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.embed.cache import FeatureCache, content_key
from diptych.embed.images import embed_images, image_space
from diptych.embed.texts import embed_texts, text_space
from diptych.errors import UsageError
from samples import TINY_VIT, make_loaded, make_pairs

WIDTH = 64


def value_of(key: bytes) -> torch.Tensor:
    """A feature that can be checked against its key alone."""
    return torch.from_numpy(np.frombuffer(key * (WIDTH // 8), np.uint8).astype(np.float32)[:WIDTH])


def keys(*numbers: int) -> list[bytes]:
    return [content_key(str(number)) for number in numbers]


def ask(cache: FeatureCache, *numbers: int, space: str = "space") -> list[bytes]:
    """Ask for features, hold them to what they must be, put those that are missing; the keys of the latter."""
    found = cache.get(space, keys(*numbers))
    assert all(torch.equal(found[key], value_of(key)) for key in found)
    missing = [key for key in dict.fromkeys(keys(*numbers)) if key not in found]
    cache.put(space, {key: value_of(key) for key in missing})
    return missing


def test_only_what_is_missing_is_computed(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    assert ask(cache, 1, 2, 1, 3) == keys(1, 2, 3)
    assert ask(cache, 3, 4, 2, 4) == keys(4)
    assert ask(cache, 1, 2, 3, 4) == []
    assert ask(FeatureCache(tmp_path / "cache"), *range(1, 1200)) == keys(*range(5, 1200))
    assert ask(cache) == []


def test_another_space_has_other_features(tmp_path):
    cache = FeatureCache(tmp_path)
    assert ask(cache, 1) == keys(1)
    assert ask(cache, 1, space="another") == keys(1)


def test_a_damaged_entry_is_computed_anew(tmp_path):
    cache = FeatureCache(tmp_path)
    ask(cache, 1, 2, 3)
    cache.close()
    with sqlite3.connect(tmp_path / "features.sqlite") as store:
        (name,) = store.execute("select key from feature order by key limit 1").fetchone()
        store.execute("update feature set value = zeroblob(length(value)) where key = ?", (name,))
    store.close()
    assert len(ask(cache, 1, 2, 3)) == 1
    assert ask(cache, 1, 2, 3) == []


@pytest.mark.parametrize("damage", [b"this is no store" * 500, b"", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_store_is_begun_anew(tmp_path, damage):
    cache = FeatureCache(tmp_path)
    ask(cache, 1, 2)
    cache.close()
    (tmp_path / "features.sqlite").write_bytes(damage)
    assert ask(cache, 1, 2) == keys(1, 2)
    assert ask(cache, 1, 2, 3) in (keys(3), keys(1, 2, 3))  # what was computed while it was mended may be lost
    assert ask(cache, 1, 2, 3) == []


def test_pages_that_are_overwritten_never_give_a_wrong_feature(tmp_path):
    cache = FeatureCache(tmp_path)
    ask(cache, *range(2000))
    cache.close()
    path = tmp_path / "features.sqlite"
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(4096, len(data), 200):
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    assert len(ask(cache, *range(2000))) >= 1
    ask(cache, *range(2000))
    assert ask(cache, *range(2000)) == []


def test_a_full_cache_forgets_what_was_not_used_for_longest(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, limit=1 << 20)
    clock = [1_000_000]
    monkeypatch.setattr("diptych.embed.cache.time.time", lambda: clock[0])
    for batch in range(12):
        clock[0] += 10_000
        ask(cache, *range(batch * 500, batch * 500 + 500))
        assert ask(cache, *range(100)) == []  # used again and again
    assert len(ask(cache, *range(500, 600))) == 100
    cache.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2 << 20


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(tmp_path / "file" / "cache")
    assert ask(cache, 1) == ask(cache, 1) == keys(1)
    assert [record.getMessage()[:34] for record in caplog.records] == ["features are computed and not kept"]
    with pytest.raises(UsageError, match="holds nothing"):
        FeatureCache(tmp_path, limit=5)


def test_threads_share_one_cache(tmp_path):
    cache = FeatureCache(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda start: ask(cache, *range(start, start + 50)), range(0, 400, 10)))
    assert ask(cache, *range(440)) == []


WORK = """
import sys; sys.path[:0] = ["tests/embed", "tests"]
from pathlib import Path
from test_cache import ask, FeatureCache
cache, seed = FeatureCache(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
for round in range(int(sys.argv[3])):
    ask(cache, *range(seed + 7 * round, seed + 7 * round + 20))
"""


def work(folder: Path, seed: int, rounds: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": "src"}
    command = [sys.executable, "-c", WORK, str(folder), str(seed), str(rounds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_cache_and_are_killed_in_the_middle(tmp_path):
    staying = [work(tmp_path, seed, 60) for seed in (0, 100)]
    killed = [work(tmp_path, seed, 1_000_000) for seed in (50, 1000)]
    for process in killed:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    for process in staying:
        process.communicate()
        assert process.returncode == 0
    assert ask(FeatureCache(tmp_path), *range(100 + 59 * 7 + 20)) == []


def test_features_of_other_weights_of_one_tower_are_others(tmp_path):
    loaded, pair = make_loaded(TINY_VIT), make_pairs(1)[0]
    cache = FeatureCache(tmp_path)
    image_key, text_key = content_key(pair.image or b""), content_key(pair.caption)
    image_feature, text_feature = embed_images(loaded, [pair.image or b""])[0], embed_texts(loaded, [pair.caption])[0]
    cache.put(image_space(loaded, "exact"), {image_key: image_feature})
    cache.put(text_space(loaded, "exact"), {text_key: text_feature})
    assert torch.equal(cache.get(image_space(loaded, "exact"), [image_key])[image_key], image_feature)
    with torch.no_grad():
        next(loaded.model.visual.parameters()).add_(1e-3)
    assert cache.get(image_space(loaded, "exact"), [image_key]) == {}
    assert torch.equal(cache.get(text_space(loaded, "exact"), [text_key])[text_key], text_feature)


def test_texts_in_int8_are_those_of_auto_and_named_so():
    loaded = make_loaded(TINY_VIT)
    assert text_space(loaded, "int8") == text_space(loaded, "auto")
    texts = ["a cat", "a dog"]
    torch.testing.assert_close(
        embed_texts(loaded, texts, precision="int8"), embed_texts(loaded, texts, precision="auto")
    )


def test_spaces_differ_in_whatever_changes_a_feature():
    loaded = make_loaded(TINY_VIT)
    spaces = {
        image_space(loaded, "exact"),
        image_space(loaded, "float32"),
        image_space(loaded, "bfloat16"),
        image_space(make_loaded(TINY_VIT, interpolation="bilinear"), "exact"),
        image_space(make_loaded(TINY_VIT, seed=1), "exact"),
        text_space(loaded, "exact"),
        text_space(make_loaded(TINY_VIT, seed=1), "exact"),
    }
    assert len(spaces) == 7
    assert image_space(make_loaded(TINY_VIT), "exact") in spaces
    assert text_space(make_loaded(TINY_VIT), "exact") in spaces
