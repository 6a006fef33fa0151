"""The Triton AdamW under the interpreter; run by test_adamw_kernels.py, which sets it up."""

from dataclasses import replace

import pytest
import torch
from test_adamw_kernels import BY, PACKED, drawn, same_bits, updated


@PACKED
@pytest.mark.parametrize("clip", [0.0, 5.0])
@pytest.mark.parametrize("grad", [torch.float32, torch.float16])
def test_the_bits_of_chunked(packed, clip, grad):
    tensors, by = drawn((2500,), packed, grad), replace(BY, variance_clip=clip)
    assert same_bits(updated(tensors, "triton", by), updated(tensors, "chunked", by))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1023,), (5, 3, 70)])
def test_any_shape(shape):
    tensors = drawn(shape, packed=True)
    assert same_bits(updated(tensors, "triton"), updated(tensors, "chunked"))


def test_a_transposed_gradient():
    p, g, m, v = drawn((5, 7), packed=True)
    g = g.T.contiguous().T
    assert same_bits(updated((p, g, m, v), "triton"), updated((p, g, m, v), "chunked"))


def test_the_bits_stay_the_same_over_many_steps():
    ours = others = drawn((300,), packed=True)
    for step in range(1, 40):
        grad = torch.randn(300) * 2.0**-step
        by = replace(BY, step=step)
        ours = updated((ours[0], grad, *ours[-2:]), "triton", by)
        others = updated((others[0], grad, *others[-2:]), "chunked", by)
    assert same_bits(ours, others)


@PACKED
def test_neighbours_in_memory_stay_as_they_are(packed):
    whole = drawn((3000,), packed)
    views = [tensor[7:1900] for tensor in whole]
    before = [tensor.clone() for tensor in whole]
    expected = updated([tensor.clone() for tensor in views], "chunked")
    from dalle_kernels.adamw import adamw_

    adamw_(*views, BY, "triton")
    assert same_bits([views[0], *views[2:]], expected)
    for tensor, old in zip(whole, before, strict=True):
        assert same_bits([tensor[:7], tensor[1900:]], [old[:7], old[1900:]])


def test_a_nan_gradient_is_not_hidden_by_the_clip():
    p, g, m, v = drawn((4,), packed=False)
    g[1] = float("nan")
    for tensor in updated((p, g, m, v), "triton"):
        assert tensor.isnan().tolist() == [False, True, False, False]


@PACKED
def test_the_optimizer_that_was_asked_for_triton(packed):
    from dalle_dist.optim.adamw import AdamW

    moments, runs = "16-bit" if packed else "fp32", []
    for implementation in ("triton", "torch"):
        torch.manual_seed(1)
        param = torch.nn.Parameter(torch.randn(200))
        # The clip keeps torch's fused kernel out, which rounds otherwise.
        options = {"moments": moments, "variance_clip": 5.0, "weight_decay": 0.1}
        optimizer = AdamW([param], implementation=implementation, **options)
        for _ in range(5):
            param.grad = torch.randn(200)
            optimizer.step()
        state = optimizer.state[param]
        runs.append((param.detach(), state["exp_avg"], state["exp_avg_sq"]))
    assert same_bits(*runs)
