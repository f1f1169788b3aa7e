import numpy as np
import pytest

from diptych.checkpoint.layouts import save
from diptych.embed.config import EmbedConfig, OutputConfig, WorkConfig
from diptych.embed.read import load_features
from diptych.embed.run import run
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
        return run(
            config,
        )

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        report = embed("cluster", "ray")
        assert (report.inputs, report.features, dict(report.skipped)) == (42, 41, {"not_a_picture": 1})
        (tmp_path / "cluster/records/00003.json").unlink()
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
