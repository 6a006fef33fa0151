"""`srun dalle-dist generate` on two nodes: the files that one process writes."""

import sys

import pytest
import tiny_run

from dalle_dist.config import from_dict, to_dict

pytestmark = pytest.mark.slow


@pytest.fixture
def release(tmp_path):
    tree = to_dict(tiny_run.make(tmp_path))
    config, target = from_dict(tree | {"sampling": {"guidance": 1.0}}), tmp_path / "release"
    tiny_run.save_random_release(target, config)
    return target


def test_two_nodes_write_what_one_process_writes(cluster, release, tmp_path):
    words = f"-m dalle_dist generate {release} orange -n 6 --batch-size 2 --format tar -o"
    log = tmp_path / "log"
    job = cluster.submit(
        "-N2",
        "--ntasks-per-node=1",
        f"--output={log}",
        "--wrap",
        f"srun {sys.executable} {words} {tmp_path}/two && {sys.executable} {words} {tmp_path}/one",
    )
    assert cluster.wait(job, 120) == "COMPLETED", log.read_text()
    assert log.read_text().count("6 images") == 2  # said by rank 0 alone
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert len(one) >= 2 and one == two
