"""Copies of pairs: the same whatever the order and the files, and as the slow twin sees them."""

import random
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.curate.rows import CANDIDATES, key_of, with_reason
from diptych.curate.text.config import NearTextConfig
from diptych.curate.text.dedup import DUPLICATE, SIGNED, DropDuplicates, MinHash, band_rows, judge, run
from diptych.errors import ShardError, UsageError
from diptych.stage.folder import part_paths, read_part, read_rows
from diptych.stage.run import Engine, Task, part_name
from reference.dedup import judge as judge_slowly
from reference.dedup import similarity

WORDS = ["red", "green", "old", "small", "house", "car", "dog", "tree", "on", "under", "near", "the", "a", "big"]
WORDS += ["river", "stone", "bridge", "winter", "photo"]


def row(url: str, caption: str, page: str) -> dict:
    return {"key": key_of(url, caption), "caption": caption, "image_url": url, "page_url": page, "details": []}


def make_rows(seed: int) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for number in range(150):
        text = " ".join(draw.choices(WORDS, k=draw.randint(8, 14)))
        url, page = f"http://i.example/{number}", f"http://{draw.randint(0, 3)}.example/{number}"
        rows.append(row(url, text, page))
        if draw.random() < 0.4:
            rows.append(row(url, text, f"{page}/again"))
        if draw.random() < 0.4:
            rows.append(row(f"{url}b", f"{text}, {draw.choice(WORDS)}!", f"{page}/near"))
        if draw.random() < 0.2:
            rows.append(rows[-1])
    return rows


def write(folder: Path, rows: list[dict], parts: int) -> None:
    made = [rows[i::parts] for i in range(parts)]

    class Give:
        def __call__(self, batches):
            for batch in batches:
                for path in batch.column("path").to_pylist():
                    some = made[int(Path(path).name)]
                    yield with_reason(pa.RecordBatch.from_pylist(some, schema=CANDIDATES), [None] * len(some))

    tasks = []
    for i in range(parts):
        (folder.parent / str(i)).write_bytes(b"")
        tasks.append(Task(part_name(i), (folder.parent / str(i),), rows=False))
    Engine().run_stage(Give(), tasks, folder, {}, schema=CANDIDATES)


def kept(tmp_path: Path, name: str, rows: list[dict], parts: int, **more) -> tuple[list[tuple], dict[str, int]]:
    (tmp_path / name).mkdir()
    write(tmp_path / name / "in", rows, parts)
    config = NearTextConfig(folder=tmp_path / name / "in", out=tmp_path / name / "out", **more)
    report = run(config, engine=Engine())
    found = [one for batch in read_rows(config.out) for one in batch.to_pylist()]
    assert report.kept == len(found)
    assert report.rows == len(rows)
    return sorted((one["caption"], one["image_url"], one["page_url"]) for one in found), report.dropped


def test_order_files_and_buckets_do_not_change_what_stays(tmp_path):
    rows = make_rows(1)
    first = kept(tmp_path, "first", rows, 1, scope="site")
    shuffled = random.Random(0).sample(rows, len(rows))
    assert kept(tmp_path, "second", shuffled, 4, scope="site", buckets=3) == first
    assert first[1].keys() == {"duplicate", "near_duplicate"}
    assert kept(tmp_path, "third", rows, 2, scope="site", seed=1)[0] != first[0]


def test_what_stays_is_no_copy_as_the_slow_twin_sees_it(tmp_path):
    rows = make_rows(2)
    found, _ = kept(tmp_path, "all", rows, 2, scope="all", similarity=0.8)
    assert max(similarity(a[0], b[0]) for a, b in combinations(found, 2)) < 0.92
    texts = {text for text, *_ in found}
    lost = {one["caption"] for one in rows} - texts
    assert lost
    assert all(max(similarity(text, other) for other in texts) > 0.6 for text in lost)


def test_scope_says_which_texts_may_be_copies(tmp_path):
    text = "a red car in front of an old house"
    rows = [
        row("http://i.example/1", text, "http://a.example/1"),
        row("http://i.example/1", f"{text}.", "http://a.example/2"),
        row("http://i.example/2", f"{text}!", "http://a.example/3"),
        row("http://i.example/3", f"{text}?", "http://b.example/"),
        row("http://i.example/3", f"{text}?", "http://b.example/again"),
    ]
    counts = {scope: len(kept(tmp_path, scope, rows, 2, scope=scope)[0]) for scope in ("image", "site", "all")}
    assert counts == {"image": 3, "site": 2, "all": 1}
    assert kept(tmp_path, "exact", rows, 1, near=False)[1] == {DUPLICATE: 1}


def test_like_texts_of_different_pictures_stay(tmp_path):
    texts = ["King Henry VII", "King Henry VIII", "Man riding a horse", "Horse riding a man", "methyl acetate tab 1"]
    texts += ["methyl acetate tab 2", "a cotton T-shirt in red for summer", "a cotton T-shirt in rod for summer"]
    rows = [row(f"http://i.example/{i}", text, "http://a.example/1") for i, text in enumerate(texts)]
    again = row("http://i.example/0", "King Henry VII!", "http://a.example/2")
    assert kept(tmp_path, "one", [*rows, again], 1)[1] == {"near_duplicate": 1}
    assert kept(tmp_path, "site", rows, 1, scope="site")[1]["near_duplicate"] >= 2


@pytest.mark.parametrize("seed", range(12))
def test_verdicts_equal_those_of_the_slow_twin(seed, tmp_path):
    draw = random.Random(seed)
    count = 150
    ranks = draw.sample(range(1 << 30), count)
    rows = [
        {
            "key": draw.randrange(120),
            "rank": rank,
            "bands": [band << 20 | draw.randrange(60) for band in range(4)],
            "signature": bytes(draw.choices(range(2), [3, 1], k=16)),
        }
        for rank in ranks
    ]
    paths = []
    for part, (start, end) in enumerate(pairwise([0, 10, 10, 90, count])):
        paths.append(tmp_path / f"{part}.parquet")
        pq.write_table(pa.Table.from_pylist(rows[start:end], schema=SIGNED), paths[-1], row_group_size=30)
    found = judge(paths, near=True, similarity=0.75, buckets=draw.randint(1, 5))
    assert [len(part) for part in found] == [10, 0, 80, 60]
    wanted = judge_slowly(rows, 0.75)
    assert set(wanted) == {0, 1, 2}
    assert np.concatenate(found).tolist() == wanted


def test_verdicts_of_other_rows_are_refused(tmp_path):
    write(tmp_path / "in", make_rows(5), 1)
    (path,) = part_paths(tmp_path / "in")
    rows = sum(map(len, read_part(path)))
    for judged in (3, rows - 1, rows + 1):
        np.save(tmp_path / "part-00000.npy", np.zeros(judged, np.uint8))
        with pytest.raises(ShardError, match=f"has not the {judged} rows that were judged; run the stage anew"):
            list(DropDuplicates(verdicts=str(tmp_path))(iter([pa.record_batch({"path": [str(path)]})])))


def test_verdicts_are_made_once_for_the_same_signatures(tmp_path):
    write(tmp_path / "in", make_rows(4), 3)
    config = NearTextConfig(folder=tmp_path / "in", out=tmp_path / "out", scope="site")
    record = tmp_path / "out_verdicts" / "verdicts.json"
    verdicts = tmp_path / "out_verdicts" / "part-00001.npy"
    first = run(config, engine=Engine())
    assert first.dropped.keys() == {"duplicate", "near_duplicate"}
    whole = verdicts.read_bytes()

    def made_anew(config: NearTextConfig = config, **more) -> bool:
        before = record.stat().st_ino, record.stat().st_mtime_ns
        report = run(config, engine=Engine(**more))
        assert (report.dropped == first.dropped) is config.near
        assert (verdicts.read_bytes() == whole) is config.near
        return before != (record.stat().st_ino, record.stat().st_mtime_ns)

    assert not made_anew()
    assert not made_anew(replace(config, buckets=3))
    verdicts.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert made_anew()
    verdicts.unlink()
    assert made_anew()
    record.write_text("{")
    run(config, engine=Engine())
    assert not made_anew()
    assert made_anew(replace(config, near=False), redo=True)
    assert made_anew(config, redo=True)


def test_signatures_estimate_the_similarity_of_the_slow_twin():
    draw = random.Random(3)
    hasher = MinHash(1024, 0)
    for _ in range(30):
        words = draw.choices(WORDS, k=10)
        a, b = " ".join(words), " ".join(words[: draw.randint(0, 10)] + draw.choices(WORDS, k=3))
        one, two = hasher([a, b])
        assert abs((one == two).mean() - similarity(a, b)) < 0.08
    assert (hasher(["🙂", "", "..."])[0] != hasher(["☂"])[0]).any()
    assert hasher([]).shape == (0, 1024)


def test_bands_fit_the_similarity_that_is_asked_for():
    assert (band_rows(128, 0.8), band_rows(128, 0.5), band_rows(16, 1.0)) == (8, 4, 8)
    with pytest.raises(UsageError, match="similarity"):
        NearTextConfig(folder=Path(), out=Path(), similarity=0.3)
