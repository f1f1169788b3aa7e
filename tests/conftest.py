import os

os.environ["OMP_NUM_THREADS"] = "1"  # of workers and all they start: on few cores, more threads wait for each other

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory, monkeypatch):
    """Indexes of foreign shards and compiled functions go into a folder of the test session, not into the user's."""
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers share what takes long to compile
        session = session.parent
    monkeypatch.setenv("DIPTYCH_CACHE", str(session / "cache"))
