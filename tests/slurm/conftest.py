"""One Slurm for all tests of a process."""

import os

import pytest

from slurm.cluster import Cluster, install


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = install()
    if reason and os.environ.get("CI"):
        pytest.fail(f"in CI the Slurm tests must run: {reason}")
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
