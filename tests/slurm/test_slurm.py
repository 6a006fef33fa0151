"""The sbatch scripts on a real slurmctld with two slurmd, one rank on each."""

import sys

import pytest

pytestmark = pytest.mark.slow

ALL_REDUCE = """
from dalle_dist.distributed import launch
ranks = launch.init()
print(ranks.launcher, ranks.rank, ranks.world, ranks.sum([ranks.rank + 1.0]))
launch.shutdown()
"""


def test_ranks_meet_over_two_nodes(cluster, tmp_path):
    program = tmp_path / "all_reduce.py"
    program.write_text(ALL_REDUCE)
    out = tmp_path / "out"
    job = cluster.submit(
        "-N2",
        "--ntasks-per-node=1",
        f"--output={out}",
        "--wrap",
        f"srun {sys.executable} {program}",
    )
    assert cluster.wait(job, 60) == "COMPLETED", out.read_text()
    assert sorted(out.read_text().split("\n")[:2]) == ["srun 0 2 [3.0]", "srun 1 2 [3.0]"]
