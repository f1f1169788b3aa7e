import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.checkpoint.layouts import save
from diptych.cli import main
from diptych.embed.bulk.config import EmbedConfig, OutputConfig, WorkConfig
from diptych.embed.bulk.folder import load_features, write_features
from diptych.embed.bulk.run import EmbedProgress, EmbedReport, run
from diptych.embed.images import embed_images
from diptych.embed.sources import Row, TextSource
from diptych.embed.texts import embed_texts
from diptych.errors import NotFoundError, RunLockedError, UsageError
from diptych.files import hold_folder, make_folder, sha256
from diptych.stage.folder import TaskRecord, write_manifest
from samples import TINY_VIT, draw, encode, make_loaded, make_pairs, noise, write_samples

EXACT = WorkConfig(precision="exact", batch_size=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    save(make_loaded(TINY_VIT), folder, "diptych")
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """23 pictures, one in a folder below, two broken ones, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b").mkdir()
    for i in range(23):
        place = folder / "b/deep.png" if i == 22 else folder / f"{i:02d}.jpg"
        place.write_bytes(encode(noise((60 + i % 3, 50), i), "PNG" if i == 22 else "JPEG"))
    (folder / "07.jpg").write_bytes(b"<html>not found</html>")
    (folder / "11.jpg").write_bytes((folder / "12.jpg").read_bytes()[:700])
    (folder / "notes.md").write_text("no picture")
    return folder


def embed(model: str, *inputs: object, out: Path, work: WorkConfig = EXACT, on_progress=None, **output) -> EmbedReport:
    config = EmbedConfig(
        model=model,
        inputs=tuple(map(str, inputs)),
        out=out,
        work=work,
        output=OutputConfig(**{"part_rows": 5} | output),
    )
    return run(config, on_progress=on_progress)


@pytest.mark.parametrize("format", ["parquet", "arrow", "npy"])
def test_a_folder_becomes_the_features_that_the_library_computes(model, pictures, tmp_path, format):
    report = embed(model, pictures, out=tmp_path / "out", format=format)
    assert (report.inputs, report.features, dict(report.skipped)) == (23, 21, {"not_a_picture": 1, "truncated": 1})
    assert report.passed_over == {".md": 1}
    found = load_features(tmp_path / "out")
    usable = [f"{i:02d}.jpg" for i in range(22) if i not in (7, 11)] + ["b/deep.png"]
    assert found.ids == usable
    assert set(found.sources) == {str(pictures)}
    expected = embed_images(make_loaded(TINY_VIT), [pictures / name for name in usable])
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-6)
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["reason"]) for entry in skipped] == [
        ("07.jpg", "not_a_picture"),
        ("11.jpg", "truncated"),
    ]


@pytest.mark.parametrize("format", ["parquet", "arrow", "npy"])
def test_features_lie_in_a_folder_of_any_name(tmp_path, format):
    out = tmp_path / os.fsdecode(b"a\xff")
    make_folder(out / "features")
    written = write_features(out / "features", "00000", format, "photos", ["a.jpg"], np.ones((1, 4), np.float32))
    hashes = {f"features/{name}": sha256(out / "features" / name) for name in written}
    record = TaskRecord(
        fingerprint="",
        rows=1,
        kept=1,
        dropped={},
        files=hashes,
    )
    write_manifest(out, stage="embed", config={}, parent=None, done=[record])
    assert (found := load_features(out)).ids == ["a.jpg"]
    assert found.features.shape == (1, 4)


def test_other_tools_read_the_parts(model, pictures, tmp_path):
    embed(model, pictures, out=tmp_path / "out", dtype="float16")
    table = pq.read_table(tmp_path / "out/features")
    assert table.schema.field("feature").type == pa.list_(pa.float16(), 24)
    assert table.num_rows == 21
    assert table.column("id")[0].as_py() == "00.jpg"


def test_halves_are_the_features_rounded(model, pictures, tmp_path):
    embed(model, pictures, out=tmp_path / "half", dtype="float16")
    embed(model, pictures, out=tmp_path / "whole")
    half, whole = load_features(tmp_path / "half").features, load_features(tmp_path / "whole").features
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, whole.astype(np.float16))


def test_text_files_and_columns_become_what_the_text_tower_says(model, tmp_path):
    texts = ["a cat", "ein Hund über\u2028Wasser", "two dogs in the rain"]
    (tmp_path / "prompts.txt").write_bytes(
        b"\xef\xbb\xbfa cat\r\n\n\xff\xfe broken\n" + texts[1].encode() + b"\n" + texts[2].encode()
    )
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "caption": [texts[0], None, "  ", texts[2]]}), tmp_path / "t.parquet")
    column = f"{tmp_path / 't.parquet'}:caption"
    report = embed(model, tmp_path / "prompts.txt", column, out=tmp_path / "out", format="npy")
    assert dict(report.skipped) == {"bad_text": 1, "empty": 2, "null": 1}
    found = load_features(tmp_path / "out")
    assert list(zip(found.ids, found.sources, strict=True)) == [
        *((row, str(tmp_path / "prompts.txt")) for row in ("0", "3", "4")),
        *((row, column) for row in ("0", "3")),
    ]
    expected = embed_texts(make_loaded(TINY_VIT), [*texts, texts[0], texts[2]])
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-6)


def test_shards_give_their_pictures_or_their_captions(model, tmp_path):
    data, pairs = write_samples(tmp_path / "shards", 24, samples_per_shard=10), make_pairs(24)
    report = embed(model, data, out=tmp_path / "pictures")
    assert (report.inputs, report.features) == (24, 24)
    found = load_features(tmp_path / "pictures")
    assert found.ids == [pair.key for pair in pairs]
    assert found.sources[9:11] == [str(data / "00000.tar"), str(data / "00001.tar")]
    expected = embed_images(make_loaded(TINY_VIT), [pair.image for pair in pairs])
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-6)
    embed(model, data, out=tmp_path / "captions", work=WorkConfig(kind="text", precision="exact"))
    expected = embed_texts(make_loaded(TINY_VIT), [pair.caption for pair in pairs])
    np.testing.assert_allclose(load_features(tmp_path / "captions").features, expected.numpy(), atol=1e-6)


def test_a_run_that_is_started_again_keeps_what_is_done(model, pictures, tmp_path):
    out = tmp_path / "out"
    embed(model, pictures, out=out)
    before = load_features(out)
    times = {file.name: file.stat().st_mtime_ns for file in (out / "features").iterdir()}
    (out / "done/00001.json").unlink()  # as if the kill had come between a part and its record
    (out / "features/00002.parquet").write_bytes(b"half")
    (out / "features/.00003.parquet.123.tmp").write_bytes(b"left by a kill")
    record = out / "done/00003.json"  # as if it had been copied from the features of another model
    record.write_text(record.read_text().replace(json.loads(record.read_text())["fingerprint"], "0" * 64))
    seen: list[EmbedProgress] = []
    report = embed(model, pictures, out=out, on_progress=seen.append)
    assert report.resumed == 23 - 15
    assert (seen[-1].done, seen[-1].total) == (23, 23)
    changed = {file.name for file in (out / "features").iterdir() if file.stat().st_mtime_ns != times[file.name]}
    assert changed == {"00001.parquet", "00002.parquet", "00003.parquet"}
    after = load_features(out)
    assert after.ids == before.ids
    np.testing.assert_array_equal(after.features, before.features)


def test_a_folder_is_not_mixed_from_two_models_inputs_or_settings(model, pictures, tmp_path):
    out = tmp_path / "out"
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\n")
    embed(model, prompts, out=out)
    save(make_loaded(TINY_VIT, seed=1), tmp_path / "other", "diptych")
    with pytest.raises(UsageError, match="another model"):
        embed(str(tmp_path / "other"), prompts, out=out)
    with pytest.raises(UsageError, match="other settings: there part_rows is 5, here 6"):
        embed(model, prompts, out=out, part_rows=6)
    with pytest.raises(UsageError, match="other inputs"):
        embed(model, pictures, out=out)
    prompts.write_text("a\nc\n")
    with pytest.raises(UsageError, match="has changed since"):
        embed(model, prompts, out=out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        embed(model, prompts, out=tmp_path / "full")


def test_a_file_that_comes_beside_the_pictures_changes_no_part(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encode(noise()))
    embed(model, tmp_path / "in", out=tmp_path / "out")
    (tmp_path / "in/notes.md").touch()
    report = embed(model, tmp_path / "in", out=tmp_path / "out")
    assert (report.resumed, report.passed_over) == (1, {".md": 1})


def test_a_model_that_was_moved_is_the_same_model(model, pictures, tmp_path):
    embed(model, pictures, out=tmp_path / "out")
    save(make_loaded(TINY_VIT), tmp_path / "moved", "diptych")
    assert embed(str(tmp_path / "moved"), pictures, out=tmp_path / "out").resumed == 23


def test_a_folder_takes_one_process_at_a_time(model, pictures, tmp_path):
    with hold_folder(tmp_path / "out"), pytest.raises(RunLockedError, match="another process"):
        embed(model, pictures, out=tmp_path / "out")


def test_a_folder_of_an_earlier_layout_or_of_another_stage_is_refused(model, pictures, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/manifest.json").write_text('{"format": "diptych features", "version": 1}')
    stage = {"format": "diptych stage", "version": 1, "stage": "crawl", "config": {}, "parent": None}
    (tmp_path / "crawl").mkdir()
    (tmp_path / "crawl/manifest.json").write_text(json.dumps(stage))
    for name in ("old", "crawl"):
        with pytest.raises(UsageError, match=r"holds no manifest\.json of this version .* name a new folder as --out"):
            embed(model, pictures, out=tmp_path / name)
        with pytest.raises(NotFoundError, match="no features"):
            load_features(tmp_path / name)


def test_a_source_that_loses_rows_while_it_is_read_is_told(model, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    monkeypatch.setattr(TextSource, "read", lambda self, start, stop: iter([Row("0", "a")]))
    with pytest.raises(UsageError, match=r"p\.txt lost rows after it was listed"):
        embed(model, tmp_path / "p.txt", out=tmp_path / "out")


def test_an_unfinished_or_damaged_folder_is_not_read(model, pictures, tmp_path):
    out = tmp_path / "out"
    embed(model, pictures, out=out)
    part = out / "features/00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UsageError, match="not what was written"):
        load_features(out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["hash"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="not finished"):
        load_features(out)
    with pytest.raises(NotFoundError, match="no features"):
        load_features(tmp_path)


@pytest.mark.slow
def test_killed_again_and_again_every_picture_comes_once(model, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    data = [encode(draw("red", "dot", 40 + i)) for i in range(20)]
    for i in range(5000):
        (pictures / f"{i:04d}.jpg").write_bytes(b"bad" if i % 1000 == 999 else data[i % 20])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diptych", "embed", model, str(pictures), "--out", str(out), "--part-rows", "250"]
    kills = 0
    for wanted in (2, 6, 10, 14):  # parts that are done when the kill comes
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((out / "done").glob("*.json"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    before = {file.name: file.stat().st_ino for file in (out / "done").iterdir()}
    assert kills == 4
    assert 14 <= len(before) < 20
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr  # five pictures were left out
    report = json.loads(ended.stdout)
    assert (report["inputs"], report["features"], report["skipped"]) == (5000, 4995, {"not_a_picture": 5})
    assert report["resumed"] == 250 * len(before)
    assert {name: (out / "done" / name).stat().st_ino for name in before} == before
    ids = load_features(out).ids
    assert ids == [f"{i:04d}.jpg" for i in range(5000) if i % 1000 != 999]


def test_the_command_says_what_it_did(model, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["embed", model, str(pictures), "--out", str(tmp_path / "out"), "--precision", "float32"])
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "23 inputs, 21 features (image float32)" in output
    assert "skipped: not_a_picture 1, truncated 1" in output
    assert "not taken for pictures: .md 1" in output


def test_one_input_is_one_input(model, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encode(noise()))
    with pytest.raises(SystemExit):
        main(["embed", model, str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--precision", "float32"])
    assert "1 input, 1 feature (image float32)" in capsys.readouterr().out


def test_help_does_not_import_torch():
    script = (
        "import sys, diptych.cli\n"
        "try: diptych.cli.main(['embed', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": "src"}
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment).returncode == 0


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/x/y"])
def test_an_out_that_cannot_be_a_folder_is_one_line(model, pictures, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["embed", model, str(pictures), "--out", out])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"diptych: cannot make the folder {out}: ")
    assert error.endswith("name another --out\n")
    assert error.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(model, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["embed", model, str(pictures), "--out", str(tmp_path / "out"), "--device", "cuda:99"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("diptych: no device 'cuda:99' here; PyTorch finds cpu")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_which_nothing_could_be_embedded_is_not_claimed(model, pictures, tmp_path):
    out, broken = tmp_path / "out", tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>not found</html>")
    assert embed(model, broken, out=out).features == 0
    report = embed(model, pictures, out=out)
    assert (report.inputs, report.features, report.resumed) == (23, 21, 0)
    found = load_features(out)
    assert len(found.ids) == 21
    assert set(found.sources) == {str(pictures)}
    with pytest.raises(UsageError, match="was begun with other inputs"):
        embed(model, broken, out=out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds no manifest\.json of this version"):
        embed(model, broken, out=out)


def test_a_disk_that_is_full_from_the_first_byte_on_locks_nobody_out(model, pictures, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diptych", "embed", model, str(pictures), "--out", str(out)]
    full = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert full.returncode == 2, full.stderr
    assert "File too large" in full.stderr
    assert embed(model, pictures, out=out).features == 21
