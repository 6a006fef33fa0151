"""Weights that AdamW is told to leave alone."""

import pytest
import torch
from torch import nn

from dalle_dist.optim.adamw import AdamW


@pytest.mark.parametrize("moments", ["fp32", "16-bit"])
def test_frozen_elements_and_their_moments_stay_and_all_others_are_updated_as_ever(moments):
    """Frozen: a run inside one parameter, and another parameter whole; of a third nothing."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(40, 5, generator=generator) for _ in range(3)]
    grads = [torch.randn(40, 5, generator=generator) for _ in range(3)]

    def after(frozen_at):
        params = [nn.Parameter(values.clone()) for values in start]
        optimizer = AdamW(params, lr=0.1, weight_decay=0.1, moments=moments)
        for step in range(3):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad * (step + 1)
            views = [params[0].data.view(-1)[33:71], params[1].data.view(-1)]
            optimizer.frozen = views if step == frozen_at else ()
            before = [_state_of(optimizer, p) for p in params] if step else []
            optimizer.step()
        return before, [_state_of(optimizer, p) for p in params]

    before, frozen = after(2)
    _, free = after(None)
    for kept, found in zip(before[0], frozen[0], strict=True):
        assert kept[33:71].equal(found[33:71])
    for found, wanted in zip(frozen[0], free[0], strict=True):
        assert found[:33].equal(wanted[:33]) and found[71:].equal(wanted[71:])
        assert not found[33:71].equal(wanted[33:71])
    assert all(map(torch.equal, frozen[1], before[1]))
    assert all(map(torch.equal, frozen[2], free[2]))


def _state_of(optimizer, param):
    """Weights and both moments, flat copies."""
    state = optimizer.state[param]
    return [x.detach().flatten().clone() for x in (param, state["exp_avg"], state["exp_avg_sq"])]
