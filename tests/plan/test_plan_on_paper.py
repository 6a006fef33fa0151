"""The plan of the 12B run on 1,024 ranks against the real code's calls, in one process for all."""

import pytest

from benchmarks import on_paper


@pytest.fixture(scope="module")
def counted():
    rows = on_paper.figures("12b", on_paper.SMALLER, (1, 2))
    return {(row.case, row.metric): row.median for row in rows}


@pytest.mark.slow
def test_a_step_has_one_all_reduce_of_all_ranks_and_waits_once_for_ours(counted):
    assert counted["step", "all-reduces of all ranks"] == 1
    assert counted["step", "waits of the host, ours"] == 1
    assert counted["step", "waits of the host, DeepSpeed's"] == 1
    assert counted["step", "all-reduces of the norm in a node"] == 2  # matrices, and all others


@pytest.mark.slow
def test_a_start_makes_three_groups_and_few_calls_of_all_ranks(counted):
    assert counted["start", "process groups made by a rank"] == 3
    assert counted["start", "collectives of all ranks"] < 10


@pytest.mark.slow
def test_bytes_are_those_of_the_plan_and_of_the_paper(counted):
    for where in ("inside a node", "between nodes"):
        assert counted["64 layers", f"sent {where} / planned"] == pytest.approx(1, abs=0.01)
    # 1 - 5 r / (8 d), the paper's table 1, of rank 64 at width 512.
    left_out = counted["64 layers", "PowerSGD leaves out"]
    assert left_out == pytest.approx(100 * (1 - 5 * 64 / (8 * 512)), abs=0.1)
