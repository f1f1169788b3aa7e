import os
import signal
from pathlib import Path

import numpy as np
import pytest

from diptych.checkpoint.layouts import save
from diptych.embed.bulk.config import EmbedConfig, OutputConfig, WorkConfig
from diptych.embed.bulk.folder import load_features
from diptych.embed.bulk.run import run
from samples import TINY_VIT, encode, make_loaded, noise

ray = pytest.importorskip("ray")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cluster_writes_what_one_machine_writes(tmp_path):
    save(make_loaded(TINY_VIT), tmp_path / "model", "diptych")
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        (tmp_path / f"pictures/{i:02d}.jpg").write_bytes(b"bad" if i == 17 else encode(noise((50, 40), i)))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    inputs = (str(tmp_path / "pictures"), str(tmp_path / "prompts.txt"))

    def embed(out: str, engine: str):
        config = EmbedConfig(
            model=str(tmp_path / "model"),
            inputs=inputs,
            out=tmp_path / out,
            output=OutputConfig(part_rows=6),
            work=WorkConfig(precision="exact", engine=engine, actors=2, batch_size=4, threads=1),
        )
        return run(config)

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        report = embed("cluster", "ray")
        assert (report.inputs, report.features, dict(report.skipped)) == (42, 41, {"not_a_picture": 1})
        (tmp_path / "cluster/done/00003.json").unlink()
        assert embed("cluster", "ray").resumed == 42 - 6
    finally:
        ray.shutdown()
    embed("alone", "local")
    cluster, alone = load_features(tmp_path / "cluster"), load_features(tmp_path / "alone")
    assert cluster.ids == alone.ids
    assert cluster.sources == alone.sources
    np.testing.assert_array_equal(cluster.features, alone.features)
    assert [file.name for file in sorted((tmp_path / "cluster/features").iterdir())] == [
        file.name for file in sorted((tmp_path / "alone/features").iterdir())
    ]


def actors_of_ours() -> list[int]:
    """Processes of Ray's actors that descend from this one."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::Actor" in (folder / "cmdline").read_bytes():
                ancestor = pid = int(folder.name)
                while ancestor > 1 and ancestor != os.getpid():
                    ancestor = parent(ancestor)
                found += [pid] if ancestor == os.getpid() else []
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_what_a_killed_actor_had_is_computed_by_another(tmp_path):
    save(make_loaded(TINY_VIT), tmp_path / "model", "diptych")
    (tmp_path / "pictures").mkdir()
    for i in range(60):
        (tmp_path / f"pictures/{i:02d}.jpg").write_bytes(encode(noise((50, 40), i)))
    config = EmbedConfig(
        model=str(tmp_path / "model"),
        inputs=(str(tmp_path / "pictures"),),
        out=tmp_path / "out",
        output=OutputConfig(part_rows=5),
        work=WorkConfig(precision="exact", engine="ray", actors=1, batch_size=4, threads=1),
    )
    killed: list[int] = []

    def kill_once(progress) -> None:
        if not killed:
            killed.extend(actors_of_ours())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False)
    try:
        report = run(config, on_progress=kill_once)
    finally:
        ray.shutdown()
    assert killed
    assert (report.inputs, report.features) == (60, 60)
    assert load_features(tmp_path / "out").ids == [f"{i:02d}.jpg" for i in range(60)]
