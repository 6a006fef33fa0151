"""`srun dalle-dist generate` on two nodes: the files that one process writes."""

import sys

import pytest
import tiny_run
import torch

from dalle_dist.checkpoint.release import save_release
from dalle_dist.config import from_dict, to_dict
from dalle_dist.transformer.model import Transformer

pytestmark = pytest.mark.slow


@pytest.fixture
def release(tmp_path):
    tree = to_dict(tiny_run.make(tmp_path))
    config, target = from_dict(tree | {"sampling": {"guidance": 1.0}}), tmp_path / "release"
    torch.manual_seed(3)
    shapes = Transformer(config).state_dict()
    weights = {name: 0.3 * torch.randn(value.shape) for name, value in shapes.items()}
    dvae = f"{config.paths.dvae_run}/release"
    save_release(str(target), config, weights, config.paths.tokenizer, dvae)
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
