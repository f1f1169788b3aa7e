import os

os.environ["OMP_NUM_THREADS"] = "1"  # of workers and all they start: on few cores, more threads wait for each other

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory, monkeypatch):
    """Indexes of foreign shards go into a folder of the test session, not into the user's."""
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
