"""Devices, cores and clocks of ranks that a test makes up."""

import time

import pytest
import wards

from dalle_dist.doctor import clocks, devices
from dalle_dist.testing import run_distributed

GPU = {"name": "NVIDIA H100", "visible": 2, "grant": "", "cores": [0, 1]}


def given(seen):
    """A fault: each rank has what `seen` says, on the hosts a, a, b, b."""
    return Seen(seen)


class Seen:
    def __init__(self, seen):
        self.seen = seen

    def __call__(self, rank):
        wards.socket.gethostname = lambda: "ab"[rank // 2]
        devices.seen = lambda device: {"uuid": f"GPU-{rank}", **GPU, **self.seen[rank]}


def verdicts(rows):
    return [(verdict, found) for _, verdict, found, _ in rows]


@pytest.mark.parametrize(
    ("seen", "verdict", "found"),
    [
        ([{}, {}, {}, {}], "ok", "4 x NVIDIA H100 on 2 hosts"),
        ([{}, {}, {}, {"uuid": "GPU-2"}], "FAIL", "one GPU for b (ranks 2, 3)"),
        ([{}, {}, {"name": "CPU", "uuid": ""}, {}], "FAIL", "CPU on b (rank 2)"),
        ([{}, {}, {}, {"name": "A100"}], "warn", "A100 on b (rank 3)"),
        ([{"visible": 8}, {}, {}, {}], "warn", "8 GPUs in sight on a, for 2 ranks"),
    ],
)
def test_gpus_are_held_against_ranks(seen, verdict, found):
    rows = run_distributed(wards.rows, 4, ["devices"], None, given(seen))
    assert verdicts(rows[3]) == verdicts(rows[0]) == [(verdict, found)]


def test_hosts_with_unequal_numbers_of_ranks_fail():
    rows = run_distributed(wards.rows, 3, ["devices"], None, given([{}, {}, {"visible": 1}]))[0]
    ((verdict, found),) = verdicts(rows)
    assert verdict == "FAIL" and "a has 2, b has 1" in found


def test_a_grant_that_the_cpu_stands_in_for_is_told():
    cpu = {"name": "CPU", "uuid": "", "visible": 0, "grant": "SLURM_STEP_GPUS=0"}
    rows = run_distributed(wards.rows, 2, ["devices"], None, given([cpu, cpu]))[0]
    expected = "SLURM_STEP_GPUS=0, but the CPU is used, on all ranks"
    assert verdicts(rows) == [("warn", expected)]


@pytest.mark.parametrize(
    ("cores", "workers", "verdict", "found"),
    [
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 0, "ok", "2 a rank"),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 1, "warn", "2 a rank"),
        ([[0, 1, 2, 3], [4, 5, 6]], 1, "ok", "3 a rank, least on a (rank 1)"),
        ([[0, 1, 2, 3], [3]], 0, "warn", "0.5 a rank, least on a (rank 1)"),
    ],
)
def test_ranks_share_the_cores_of_their_host(cores, workers, verdict, found):
    seen = [{"cores": mine} for mine in cores]
    config = wards.config_of(None, f"data.workers={workers}")
    (row,) = run_distributed(wards.rows, 2, ["cores"], config, given(seen))[0]
    assert row[1] == verdict and row[2].startswith(found)
    assert row[3].startswith(f"{workers + 2} ")


@pytest.mark.parametrize(
    ("overrides", "verdict", "found"),
    [
        (["train.batch_size=12", "train.micro_batch=3"], "ok", "12 samples = 2 ranks x 2 x 3"),
        (
            ["train.batch_size=12", "train.micro_batch=4"],
            "FAIL",
            "train.batch_size: 12 is not a mul",
        ),
        (
            ["parallel.between_nodes=dense", "train.zero_stage=0"],
            "FAIL",
            "parallel.between_nodes: ",
        ),
    ],
)
def test_what_does_not_fit_the_ranks_fails(overrides, verdict, found):
    config = wards.config_of(None, *overrides)
    for rows in run_distributed(wards.rows, 2, ["batch"], config):
        assert rows[0][1] == verdict and rows[0][2].startswith(found)


class Late:
    """Rank 2's clock is off by so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, rank):
        wards.own_host(rank)
        offset = self.seconds if rank == 2 else 0.0
        clocks.now = lambda: time.time() + offset


@pytest.mark.parametrize(("seconds", "verdict"), [(-300.0, "FAIL"), (20.0, "warn")])
def test_a_clock_that_is_off_is_named(seconds, verdict):
    for rows in run_distributed(wards.rows, 3, ["clocks"], None, Late(seconds)):
        ((_, found_verdict, found, _),) = rows
        assert found_verdict == verdict
        amount, _, where = found.partition(" s on ")
        assert where == "n2 (rank 2)"
        assert float(amount) == pytest.approx(seconds, abs=8)


def test_clocks_that_agree_are_fine():
    ((_, verdict, found, _),) = run_distributed(wards.rows, 3, ["clocks"], None, Late(0.0))[0]
    assert verdict == "ok" and found.endswith("s apart at most, 3 hosts")
