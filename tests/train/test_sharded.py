"""Checkpoints that several FSDP2 ranks write together: the same files, whoever wrote them, whatever happened then."""

import json
import shutil
import time
from pathlib import Path

import jobs
import pytest

from diptych.checkpoint.formats import native
from samples import write_samples

FILES = ("model.safetensors", "training.safetensors")
AGAIN = """job = loop.connect(60.0, 'cpu'); t = trainer.Trainer(config, job, lambda _: None)
    print(t.resume()); t.save(); loop.disconnect(job)"""
"""Continue from the newest checkpoint and write it again."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_in(out: Path) -> list[int]:
    return sorted(step for folder in out.iterdir() if (step := native.step_of(folder)) is not None)


@pytest.mark.parametrize(("sizes", "options"), [
    pytest.param((2, 4), {}, marks=pytest.mark.slow),  # TINY_VIT has tensors of fewer than four rows
    ((2,), {"model": "TINY_RESNET", "half_statistics": True}),
])  # fmt: skip
def test_any_number_of_ranks_writes_the_file_of_one_process(data, tmp_path, sizes, options):
    jobs.run(data, tmp_path / "run", 1, steps=3, checkpoint_every=3, **options)
    folder = tmp_path / "run/step_00000003"
    shutil.copytree(folder, tmp_path / "before")
    for world_size in sizes:
        written = (folder / FILES[0]).stat().st_ino
        output = jobs.run(
            data, tmp_path / "run", world_size, steps=3, checkpoint_every=3, sharding="fsdp", work=AGAIN, **options
        )
        assert "(3, ())" in output[0]
        assert (folder / FILES[0]).stat().st_ino != written
        for name in FILES:
            assert (folder / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), (world_size, name)
        native.read_description(folder)


@pytest.mark.slow
def test_a_run_goes_on_with_two_then_one_then_four_ranks(data, tmp_path):
    jobs.run(data, tmp_path / "alone", 1, steps=12, checkpoint_every=12)
    for world_size, last in ((2, 4), (1, 8), (4, 12)):
        stop = f"report.step == {last} and __import__('os').kill(__import__('os').getpid(), 15)"
        jobs.run(data, tmp_path / "run", world_size, steps=12, checkpoint_every=100, sharding="fsdp", on_step=stop)
        assert steps_in(tmp_path / "run")[-1] == last
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


# --- memory ---------------------------------------------------------------------------------------------------------

LARGE = """import os; config = dataclasses.replace(config, model=dataclasses.replace(config.model,
        vision=dataclasses.replace(config.model.vision, width=384, layers=12, heads=6)))
    job = loop.connect(60.0, 'cpu'); t = trainer.Trainer(config, job, lambda _: None)
    config.out.mkdir(exist_ok=True)
    def status(field):
        return int(Path('/proc/self/status').read_text().split(field + ':')[1].split()[0]) << 10
    def growth(action):
        job.barrier(); Path('/proc/self/clear_refs').write_text('5'); before = status('VmRSS'); action()
        return status('VmHWM') - before
    if {resumes}:
        grown = growth(t.resume)
    else:
        t.resume()
        for parameter in t.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        t.optimizer.step(); t.optimizer.zero_grad(); t.state.step, t.state.loss, t.state.grad_norms = 3, 0.0, (0.0, 0.0)
        t.save()  # what torch makes when it is first asked is no part of a checkpoint
        grown = growth(t.save)
    print(grown)
    loop.disconnect(job)"""


@pytest.mark.slow
def test_no_rank_holds_the_whole_model_or_optimizer_when_a_checkpoint_is_written_or_read(data, tmp_path):
    grown = {}
    for resumes in (False, True):
        work = LARGE.replace("{resumes}", str(resumes))
        output = jobs.run(data, tmp_path / "run", 4, steps=3, sharding="fsdp", work=work)
        grown[resumes] = [int(text.split()[-1]) for text in output]
    state = sum((tmp_path / "run/step_00000003" / name).stat().st_size for name in FILES)
    assert state > 200 << 20
    assert max(grown[False]) < 12 << 20, grown  # the largest tensor has 2 MiB
    # A quarter of the statistics in memory of their own, a quarter of both files as pages that the system may drop.
    assert max(grown[True]) < 0.55 * state, grown


# --- what may happen meanwhile --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    jobs.run(data, out, 2, steps=8, checkpoint_every=3, sharding="fsdp")
    return out


def disturb(data: Path, out: Path, rank: int, action: str, timeout: float = 30.0) -> tuple[list[str], list[int], float]:
    """Let a rank of two do something at step 5, the next checkpoint being that of step 6."""
    on_step = f"os = __import__('os'); os.environ['RANK'] == '{rank}' and report.step == 5 and {action}"
    started = jobs.start(data, out, 2, steps=8, checkpoint_every=3, sharding="fsdp", on_step=on_step, timeout=timeout)
    other, own = started[1 - rank], started[rank]
    output = other.communicate(timeout=90)[0]
    ended = time.time()
    own.kill()
    return [output, own.communicate(timeout=30)[0]], [other.returncode, own.returncode], ended


DIES = (
    "setattr(os, 'pwrite', lambda f, d, s, w=os.pwrite, n=iter(range(99)): w(f, d, s) if next(n) < 9 else "
    "os.kill(os.getpid(), 9))"
)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_while_it_writes_costs_no_more_than_the_steps_since_the_last_checkpoint(
    data, straight, tmp_path, rank
):
    output, codes, _ = disturb(data, tmp_path / "run", rank, DIES)
    assert codes == [2, -9]
    assert f"RankLostError rank {1 - rank} of 2 lost the others" in output[0]
    assert steps_in(tmp_path / "run") == [3]
    assert bool(list((tmp_path / "run").glob(".step_*.tmp"))) == (rank == 0)
    assert_goes_on_as(straight, data, tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_in_one_clear_error_within_the_timeout(data, straight, tmp_path):
    output, codes, ended = disturb(data, tmp_path / "run", 1, "os.kill(os.getpid(), 19)", timeout=5.0)
    assert codes == [2, -9]
    assert "RankLostError rank 0 of 2 lost the others" in output[0]
    hung = (tmp_path / "run/metrics.jsonl").stat().st_mtime  # step 5 was logged just before
    assert 4 < ended - hung < 25, ended - hung  # the timeout, and what a process takes to end
    assert_goes_on_as(straight, data, tmp_path / "run")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_without_room_ends_all_with_its_reason(data, straight, tmp_path, rank):
    no_room = "__import__('resource').setrlimit(__import__('resource').RLIMIT_FSIZE, (4096, 4096))"
    on_step = f"__import__('os').environ['RANK'] == '{rank}' and report.step == 5 and {no_room}"
    both = jobs.start(data, tmp_path / "run", 2, steps=8, checkpoint_every=3, sharding="fsdp", on_step=on_step)
    for process in both:
        output = process.communicate(timeout=90)[0]
        assert process.returncode == 2
        assert f"CheckpointError rank {rank} of 2 could not write its part of a checkpoint: " in output
        assert "File too large" in output
    assert_goes_on_as(straight, data, tmp_path / "run")


FAILS = """from diptych import files
    from diptych.checkpoint.formats import native
    from diptych.tokenizer import Tokenizer
    from diptych.train.run_folder.checkpoints import CheckpointManager
    job = loop.connect(20.0, 'cpu'); t = trainer.Trainer(config, job, lambda _: None); t.resume()
    def full(*_):
        raise OSError('no space left on device')
    places = ((files, 'atomic_folder'), (native, 'make_file'), (Tokenizer, 'save'), (native, '_describe'),
        (files, 'sync_folder'), (CheckpointManager, 'saved'))
    for owner, name in places:
        whole = getattr(owner, name)
        if job.is_first:
            setattr(owner, name, full)
        try:
            t.save()
        except DiptychError as error:
            print(type(error).__name__, error)
        setattr(owner, name, whole)
    t.save(); loop.disconnect(job)"""
"""Let the first rank fail at each thing that it does alone, then write a checkpoint."""


@pytest.mark.parametrize("sharding", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_whatever_the_first_rank_fails_at_no_other_waits_for_it(data, straight, tmp_path, sharding):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for output in jobs.run(data, out, 2, steps=8, checkpoint_every=3, sharding=sharding, work=FAILS):
        lines = output.splitlines()
        told = "CheckpointError rank 0 of 2 could not write its part of a checkpoint: no space left on device"
        assert [line.startswith(told) for line in lines] == [True] * 6, lines
    assert not list(out.glob(".*.tmp"))
    native.read_description(out / "step_00000008")


def assert_goes_on_as(straight: Path, data: Path, out: Path) -> None:
    """The next start finds the older checkpoint, leaves nothing half-done, and ends as if nothing had been."""
    jobs.run(data, out, 2, steps=8, checkpoint_every=3, sharding="fsdp")
    assert steps_in(out) == steps_in(straight)
    assert not list(out.glob(".*.tmp"))
    for name in ("metrics.jsonl", *(f"step_00000008/{file}" for file in FILES)):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name
