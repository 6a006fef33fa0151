"""Every test starts clean: its own cache folder, no process group, default dtype, fixed seed."""

import os

import pytest
import torch

# Tests run beside one another on few cores, and their figures must not depend on the machine's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Where the long files are: they go first, so that no process is left alone with one at the end.
LONG = (
    "tests/test_readme.py", "tests/test_wheel.py", "tests/test_benchmarks.py", "tests/slurm",
    "tests/engine", "tests/gradients", "tests/train", "tests/kernels",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(autouse=True)
def _clean_state(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    from dalle_dist.distributed import process_group

    process_group.shutdown()
