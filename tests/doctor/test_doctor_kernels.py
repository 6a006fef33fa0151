"""A kernel that computes something else than the reference is found, forward and backward."""

import pytest
import torch
import wards
from dalle_kernels.sparse_attention import BACKENDS

from dalle_dist.distributed import process_group
from dalle_dist.doctor import kernels
from dalle_dist.testing import run_distributed

LARGE = ("transformer.image_grid=16", "dvae.image_size=64", "train.precision=fp32")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


FAULTS = {
    "output": lambda out: out + 1e-2 * out.abs().max(),
    "gradient": WrongGradient.apply,
    "nan": lambda out: out * float("nan"),
}


def wrong(kind):
    right = BACKENDS["cpu"]
    return lambda qkv, mask: FAULTS[kind](right(qkv, mask))


def look(config=None):
    return wards.rows(process_group.init(), ["attention"], config)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_wrong_kernel_fails(kind, monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", wrong(kind))
    ((_, verdict, found, _),) = look(wards.config_of(None, *LARGE))
    assert verdict == "FAIL" and " in fp32 on " in found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_backend_of_the_run_is_right_in_each_dtype(precision):
    config = wards.config_of(None, *LARGE[:2], f"train.precision={precision}")
    ((_, verdict, found, _),) = look(config)
    assert verdict == "ok" and found.startswith(f"cpu, {precision}: error ")
    error = float(found.split()[-1])
    assert kernels.TOLERANCE[precision] / 1e4 < error < kernels.TOLERANCE[precision] / 2


def test_a_small_image_takes_the_reference_on_cpus():
    ((_, verdict, found, _),) = look(
        wards.config_of(None, "transformer.image_grid=8", "dvae.image_size=32")
    )
    assert verdict == "ok" and found.startswith("reference, ")


def test_without_a_config_all_kinds_of_masks_are_tried(monkeypatch):
    tried = []
    right = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda q, m, b: tried.append(m.kind) or right(q, m, b))
    assert look()[0][1] == "ok"
    assert set(tried) == {"row", "column", "conv", "causal"}


def one_wrong(rank):
    wards.own_host(rank)
    if rank == 1:
        BACKENDS["cpu"] = wrong("output")


def test_the_rank_with_the_wrong_kernel_is_named():
    config = wards.config_of(None, *LARGE)
    for rows in run_distributed(wards.rows, 2, ["attention"], config, one_wrong):
        ((_, verdict, found, _),) = rows
        assert verdict == "FAIL" and found.endswith(" in fp32 on n1 (rank 1)")
