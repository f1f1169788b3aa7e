"""What stays of a run, and who may write it."""

import json
import os
import shutil
import signal
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import fsspec
import jobs
import pytest

from diptych.checkpoint.formats import native
from diptych.errors import CheckpointError, RunLockedError, UsageError
from diptych.files import hold_folder
from diptych.tokenizer import Tokenizer
from diptych.train import loop
from diptych.train.run_folder.checkpoints import CheckpointManager, Mirror
from samples import SMALL_VOCABULARY, TINY_VIT, small, train_config, write_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


def steps_in(out: Path) -> list[int]:
    return sorted(step for folder in out.iterdir() if (step := native.step_of(folder)) is not None)


def test_a_run_s_folder_that_is_a_file_is_refused(data, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="run: it is a file; name another --out"):
        loop.run(train_config(data, tmp_path / "run", steps=1))


def test_the_last_k_and_the_best_stay(data, tmp_path):
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    config = train_config(
        data, tmp_path / "run", steps=10, checkpoint_every=2, evaluate_every=2, keep_last=2, keep_best="score"
    )
    loop.run(config, evaluators=[lambda model: {"score": next(scores)}])
    assert steps_in(tmp_path / "run") == [4, 8, 10]


def test_the_best_is_still_known_after_a_resume(data, tmp_path):
    config = train_config(
        data, tmp_path / "run", steps=4, checkpoint_every=2, evaluate_every=2, keep_last=1, keep_best="score"
    )
    first, second = iter([0.9, 0.1]), iter([0.2, 0.3])
    loop.run(config, evaluators=[lambda model: {"score": next(first)}])
    longer = replace(config, run=replace(config.run, extend_to=8))
    loop.run(longer, evaluators=[lambda model: {"score": next(second)}])
    assert steps_in(tmp_path / "run") == [2, 8]


def test_a_best_that_nothing_measures_is_refused(data, tmp_path):
    config = train_config(data, tmp_path / "run", steps=3, keep_best="acc1")
    with pytest.raises(UsageError, match="acc1 is not among the metrics of this run: score"):
        loop.run(config, evaluators=[lambda model: {"score": 1.0}])


def test_minutes_make_checkpoints_too(data, tmp_path):
    config = train_config(data, tmp_path / "run", steps=3, checkpoint_minutes=1e-9, keep_last=None)
    loop.run(config)
    assert steps_in(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_next_start_goes_on_exactly(data, tmp_path, number):
    straight = train_config(data, tmp_path / "straight", steps=6)
    loop.run(straight)
    config = train_config(data, tmp_path / "run", steps=6)
    report = loop.run(config, on_step=lambda r: os.kill(os.getpid(), number) if r.step == 3 else None)
    assert (report.steps, report.stopped_by) == (3, number.name)
    assert steps_in(tmp_path / "run") == [3]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    report = loop.run(config)
    assert (report.resumed_from, report.steps, report.stopped_by) == (3, 6, None)
    for name in ("step_00000006/model.safetensors", "step_00000006/training.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_a_second_process_on_the_same_run_is_refused(data, tmp_path):
    slow = "__import__('time').sleep(0.2)"
    (process,) = jobs.start(data, tmp_path / "run", 1, steps=1000, on_step=slow)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(RunLockedError, match=f"in use by another process .process {process.pid} "):
            loop.run(train_config(data, tmp_path / "run", steps=1000))
    finally:
        process.kill()
        process.communicate()
    with hold_folder(tmp_path / "run"):
        pass  # a lock ends with its process


def test_a_changed_batch_size_does_not_move_the_learning_rate_or_lose_a_sample(data, tmp_path):
    straight = train_config(data, tmp_path / "straight", steps=8, batch_size=8)
    seen = []
    loop.run(straight, on_step=lambda report: seen.append(report.lr))
    stop = {"on_step": lambda r: os.kill(os.getpid(), signal.SIGTERM) if r.step == 4 else None}
    config = train_config(data, tmp_path / "run", steps=8, batch_size=8)
    loop.run(config, **stop)
    rates = []
    larger = replace(config, loader=replace(config.loader, batch_size=16))
    report = loop.run(larger, on_step=lambda r: rates.append(r.lr))
    assert rates == seen[4:]
    assert report.samples_seen == 4 * 8 + 4 * 16


def test_a_run_is_extended_only_when_asked(data, tmp_path):
    config = train_config(data, tmp_path / "run", steps=4)
    loop.run(config)
    with pytest.raises(UsageError, match="steps 4 there, 8 here"):
        loop.run(replace(config, run=replace(config.run, steps=8)))
    rates = []
    extended = replace(config, run=replace(config.run, extend_to=8))
    report = loop.run(extended, on_step=lambda r: rates.append(r.lr))
    assert (report.resumed_from, report.steps) == (4, 8)
    assert rates[0] > rates[-1] > 0


def test_checkpoints_are_mirrored_and_an_empty_folder_goes_on_from_there(data, tmp_path):
    url = f"file://{tmp_path / 'bucket'}"
    config = train_config(data, tmp_path / "run", steps=6, checkpoint_every=2, keep_last=2, mirror=url)
    loop.run(config)
    assert steps_in(tmp_path / "bucket") == [4, 6]
    other = replace(config, out=tmp_path / "elsewhere")
    report = loop.run(other)
    assert (report.resumed_from, report.steps) == (6, 6)
    assert (tmp_path / "elsewhere/metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()


def test_a_half_copied_or_damaged_checkpoint_in_the_mirror_is_passed_over(data, tmp_path):
    url = f"file://{tmp_path / 'bucket'}"
    config = train_config(data, tmp_path / "run", steps=6, checkpoint_every=2, keep_last=None, mirror=url)
    loop.run(config)
    (tmp_path / "bucket/step_00000006/checkpoint.json").unlink()
    weights = tmp_path / "bucket/step_00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    report = loop.run(replace(config, out=tmp_path / "elsewhere"))
    assert report.resumed_from == 2
    assert ["step_00000006" in report.passed_over[0], "model.safetensors" in report.passed_over[1]] == [True, True]
    final = "step_00000006/model.safetensors"
    assert (tmp_path / "elsewhere" / final).read_bytes() == (tmp_path / "run" / final).read_bytes()


def test_a_mirror_that_fails_says_so_and_what_is_safe(data, tmp_path):
    (tmp_path / "bucket").write_text("not a folder")
    config = train_config(data, tmp_path / "run", steps=3, mirror=f"file://{tmp_path / 'bucket'}")
    with pytest.raises(CheckpointError, match="the checkpoints on this machine are whole"):
        loop.run(config)
    assert steps_in(tmp_path / "run") == [3]


def test_a_mirror_of_no_known_kind_is_refused():
    with pytest.raises(UsageError, match="mirror nowhere://x cannot be used"):
        Mirror("nowhere://x")
    assert "memory" in fsspec.available_protocols()


def test_numbers_go_to_tensorboard_when_asked_for(data, tmp_path):
    pytest.importorskip("tensorboard")
    loop.run(train_config(data, tmp_path / "run", steps=3, log=("tensorboard",)))
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_a_log_of_gradients_memory_and_rates_is_always_written(data, tmp_path):
    loop.run(train_config(data, tmp_path / "run", steps=3))
    metrics, timing = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "timing.jsonl")
    )
    assert metrics[0].keys() == {
        *("step", "loss", "lr", "logit_scale", "grad_norm_image", "grad_norm_text", "samples_seen")
    }
    assert timing[0].keys() == {"step", "pairs_per_second", "data_wait", "memory", "seconds_left"}
    assert metrics[0]["grad_norm_image"] > 0
    assert timing[0]["memory"] > 50e6


def test_nothing_that_changes_the_result_may_change_within_a_run():
    def free(config) -> list[str]:
        nested = [getattr(config, f.name) for f in fields(config)]
        return [f.name for f in fields(config) if f.metadata.get("may_change")] + [
            name for value in nested if is_dataclass(value) for name in free(value)
        ]

    assert sorted(free(train_config(Path("data"), Path("out")))) == sorted([
        *("out", "batch_size", "workers", "prefetch", "cache", "cache_bytes"),
        *("checkpoint_every", "checkpoint_minutes", "keep_last", "keep_best", "mirror", "evaluate_every", "log"),
        *("device", "micro_batch_size", "sharding", "recompute", "timeout", "extend_to"),
        *("cache_features", "feature_cache", "stop_when_lost", "templates"),
    ])  # fmt: skip


def test_a_copy_of_one_s_own_is_no_checkpoint_of_the_run(data, tmp_path):
    """It is neither gone on from nor deleted, whatever its name begins with."""
    config = train_config(data, tmp_path / "run", steps=3)
    loop.run(config)
    for name in ("step_best", "step_00000001_backup", "00000007"):
        shutil.copytree(tmp_path / "run/step_00000003", tmp_path / "run" / name)
    (tmp_path / "run/step_notes.txt").write_text("mine")
    CheckpointManager(tmp_path / "run", replace(config.run, keep_last=1)).saved(3, [])
    assert native.step_folders(tmp_path / "run") == [tmp_path / "run/step_00000003"]
    assert (tmp_path / "run/step_notes.txt").read_text() == "mine"
    assert all((tmp_path / "run" / name).is_dir() for name in ("step_best", "step_00000001_backup", "00000007"))


@pytest.mark.parametrize("content", [None, "", "[]", "[" * 100_000, "{}", "5"])
def test_a_run_whose_settings_are_lost_is_not_gone_on_with_in_a_guess(data, tmp_path, content):
    loop.run(train_config(data, tmp_path / "run", steps=3))
    path = tmp_path / "run/config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises((CheckpointError, UsageError)):
        loop.run(train_config(data, tmp_path / "run", steps=3))


def test_a_log_that_lost_its_end_is_gone_on_with_and_never_filled_with_zeros(data, tmp_path):
    loop.run(train_config(data, tmp_path / "run", steps=3))
    path = tmp_path / "run/metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="has lost .* bytes since the last checkpoint"):
        loop.run(train_config(data, tmp_path / "run", steps=3))
    assert whole.startswith(path.read_bytes().rpartition(b"\n")[0])
    assert b"\0" not in path.read_bytes()


def test_a_run_goes_on_only_with_the_tokenizer_that_it_began_with(data, tmp_path):
    merges = SMALL_VOCABULARY.merges
    SMALL_VOCABULARY.save(tmp_path / "words")
    config = train_config(data, tmp_path / "run", model=small(TINY_VIT), steps=2, warmup=1)
    config = replace(config, tokenizer=tmp_path / "words")
    loop.run(config)
    Tokenizer((merges[2], merges[3], *merges[:2], *merges[4:]), context_length=16).save(tmp_path / "words")
    with pytest.raises(UsageError, match="the tokenizer is not the one that the run in"):
        loop.run(replace(config, run=replace(config.run, extend_to=4)))
