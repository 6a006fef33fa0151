"""Every test starts clean: its own cache folder, no process group, default dtype, fixed seed."""

import os

import pytest
import torch

# Tests run beside one another on few cores, and their figures must not depend on the machine's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _clean_state(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    from dalle_dist.distributed import launch

    launch.shutdown()
