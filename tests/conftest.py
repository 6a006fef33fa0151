"""Every test starts clean: its own cache folder, no process group, default dtype, fixed seed."""

import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest
import torch

# Tests run beside one another on few cores, and their figures must not depend on the machine's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples each time, and no folder of found ones beside the tests.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("fixed")

ROOT = Path(__file__).parents[1]

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
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "")  # which a run sets
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    from dalle_dist.distributed import process_group

    process_group.shutdown()


@pytest.fixture(scope="session")
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path):
    """An empty bucket on an HTTP server of its own; its URL, and a cache of its own."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / "s3-cache"))
    name = "b" + "".join(c for c in tmp_path.name.lower() if c.isalnum())[:40]
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def hurried(monkeypatch):
    """Settings of the storage with pauses and time limits for loopback; a test may change them."""
    from dalle_dist.storage.settings import SETTINGS

    for name, value in {"base": 0.002, "cap": 0.05, "read_timeout": 0.5}.items():
        monkeypatch.setattr(SETTINGS, name, value)
    return SETTINGS


@pytest.fixture
def slow_network(monkeypatch):
    """The module, where namespaces can be made; in CI they must."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import slow_network

    if os.geteuid() == 0 and shutil.which("apt-get") and not shutil.which("ip"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "iproute2"]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True)
    reason = slow_network.missing()
    if reason and os.environ.get("CI"):
        pytest.fail(f"in CI the slow network must be tested: {reason}")
    if reason:
        pytest.skip(reason)
    return slow_network
