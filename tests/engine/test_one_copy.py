"""ZeRO-3 updates the weights and uses the gradients that it has, and makes no copies of them."""

import pytest
import torch
from torch._utils import _flatten_dense_tensors

from dalle_dist.engine.deepspeed.one_copy import _flatten_views
from dalle_dist.testing import run_distributed
from tests.engine.test_fp16 import backward, build


def _addresses(ranks, precision):
    engine = build(ranks, 3, f"train.precision={precision}", "train.micro_batch=4")
    optimizer, used = engine._engine.basic_optimizer, []
    step = optimizer.step

    def told(*arguments):
        (weights,) = [p for group in optimizer.param_groups for p in group["params"]]
        used.append((weights.data_ptr(), weights.grad.data_ptr()))
        return step(*arguments)

    optimizer.step = told
    backward(engine, ranks, 0)
    gradients = {piece.values.untyped_storage().data_ptr() for piece in engine.gradients()}
    starts = {piece.values.data_ptr() for piece in engine.gradients()}
    engine.step(1e-3)
    shards = {p.ds_tensor.untyped_storage().data_ptr() for p in engine.module.parameters()}
    return used, gradients, starts, shards


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_sub_groups_have_no_copies_of_their_own(precision):
    for used, gradients, starts, shards in run_distributed(_addresses, 2, precision):
        assert len(used) == 2 and len(gradients) == 1
        assert {gradient for _, gradient in used} <= starts
        masters = {weight for weight, _ in used}
        assert len(masters) == 2
        assert (min(masters) in shards) == (precision != "bf16")


def test_tensors_that_lie_apart_are_copied():
    flat, flatten = torch.arange(12.0), _flatten_views(_flatten_dense_tensors)
    together = flatten([flat[:3], flat[3:9].view(2, 3), flat[9:]])
    assert together.data_ptr() == flat.data_ptr() and torch.equal(together, flat)
    for apart in ([flat[:3], flat[4:9]], [flat[3:9], flat[:3]], [flat[:3], torch.ones(2)]):
        copied = flatten(apart)
        assert torch.equal(copied, torch.cat([t.view(-1) for t in apart]))
        assert copied.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()
