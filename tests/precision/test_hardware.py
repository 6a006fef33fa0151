"""Which number format `precision: auto` becomes."""

import pytest
import torch

from dalle_dist.distributed import process_group
from dalle_dist.precision.hardware import computes_in_bf16, decided
from dalle_dist.testing import run_distributed


@pytest.mark.parametrize("has", [True, False])
def test_auto_asks_the_processor(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    ranks = process_group.init()
    assert computes_in_bf16(torch.device("cpu")) == has
    assert decided("auto", ranks) == ("bf16" if has else "fp32")
    assert [decided(name, ranks) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def one_rank_without(ranks):
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": ranks.rank == 0}
    return decided("auto", ranks)


def test_one_rank_without_bf16_decides_for_all():
    assert run_distributed(one_rank_without, 2) == ["fp32", "fp32"]
