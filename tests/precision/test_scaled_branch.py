"""The flow of Fig. 4 through one branch and through the transformer."""

import pytest
import torch
from torch import nn

from dalle_dist.config import load
from dalle_dist.precision.scaled_branch import scaled_branch
from dalle_dist.precision.scales import BlockScale, BlockScales
from dalle_dist.transformer.blocks import attach_scales, compile_blocks, resblocks
from dalle_dist.transformer.embeddings import use_layer_norm
from dalle_dist.transformer.model import Transformer

TINY = [
    "transformer.layers=4", "transformer.width=64", "transformer.heads=1",
    "transformer.text_tokens=6", "transformer.image_grid=4", "transformer.conv_kernel=3",
    "tokenizer.vocab_size=40", "dvae.image_size=32", "dvae.downsamplings=3",
    "dvae.codebook_size=20", "transformer.codebook_size=20",
]  # fmt: skip


def scale_of(value, dtype=torch.float16):
    scales = BlockScales(1, 1)
    scales.scale_K.fill_(value)
    return BlockScale(scales, 0, dtype)


def branch_gradients(f, grad, value, dtype=torch.float16):
    """Gradients of the stream and of the norm's gain for a gradient that arrives at the output."""
    x, norm = torch.linspace(-1, 1, 8).requires_grad_(), nn.LayerNorm(8)
    scaled_branch(x, norm, f, scale_of(value, dtype)).backward(grad)
    return x.grad, norm.weight.grad


def test_forward_computes_in_fp16_and_returns_fp32():
    seen = []
    out = scaled_branch(
        torch.randn(2, 8), nn.LayerNorm(8), lambda h: seen.append(h.dtype) or h * 3, scale_of(8.0)
    )
    assert (seen, out.dtype) == ([torch.float16], torch.float32)


def test_the_inside_sees_scaled_fp16_gradients_and_the_norm_keeps_the_scale():
    seen = []

    def f(h):
        h.register_hook(lambda g: seen.append(g))
        return h * 1

    grad = torch.arange(8.0) * 2.0**-20  # below what fp16 holds with full precision
    stream, gain = branch_gradients(f, grad, 2.0**13)
    assert seen[0].dtype == torch.float16 and seen[0].float().equal(grad * 2.0**13)
    plain_stream, plain_gain = branch_gradients(lambda h: h, grad, 1.0, torch.float32)
    torch.testing.assert_close(stream, plain_stream, rtol=2e-3, atol=2.0**-30)
    torch.testing.assert_close(gain, plain_gain * 2.0**13, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_filtered_on_the_way_in(poison):
    grad = torch.ones(8)
    grad[3] = poison
    clean = torch.ones(8)
    clean[3] = 0
    for found, expected in zip(
        branch_gradients(torch.tanh, grad, 4.0), branch_gradients(torch.tanh, clean, 4.0),
        strict=True,
    ):  # fmt: skip
        assert found.equal(expected)


def test_an_overflow_inside_marks_the_parameters_and_not_the_stream():
    """100 x 2^13 is beyond fp16: the gain's gradient says so, the blocks before get zeros."""
    stream, gain = branch_gradients(lambda h: h * 1, torch.full((8,), 100.0), 2.0**13)
    assert not gain.isfinite().any()
    assert stream.equal(torch.zeros(8))


def model(*overrides):
    torch.manual_seed(0)
    built = Transformer(load("emoji", [*TINY, "train.checkpoint_activations=false", *overrides]))
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


def batch(size=4):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randint(2, 40, (size, 6), generator=generator),
        torch.randint(0, 20, (size, 16), generator=generator),
    )


def gradients(built, parts=1):
    for text_BT, codes_BN in zip(*(x.chunk(parts) for x in batch()), strict=True):
        (built(text_BT, codes_BN).total(1 / 8) / parts).backward()
    return {name: p.grad for name, p in built.named_parameters()}


def in_true_units(built, scales, found):
    block = {f"{n}.{own}": k for k, (n, b) in enumerate(resblocks(built))
             for own, _ in b.named_parameters()}  # fmt: skip
    return {n: g / scales.values[block[n]] if n in block else g for n, g in found.items()}


def scaled(*overrides, dtype=torch.float16, value=None):
    built, scales = model(*overrides), BlockScales(8, 1)
    if value is not None:
        scales.scale_K.fill_(value)
    attach_scales(built, scales, dtype)
    return built, scales


def assert_close_to_plain(found):
    """As close as fp16 comes to it; in norm, since small entries have large errors."""
    for name, grad in gradients(model()).items():
        assert (found[name] - grad).norm() <= 1e-2 * grad.norm(), name


def test_scales_of_one_in_fp32_give_plain_gradients_bit_for_bit():
    plain, found = gradients(model()), gradients(scaled(dtype=torch.float32, value=1.0)[0])
    assert plain.keys() == found.keys()
    assert all(found[name].equal(grad) for name, grad in plain.items())


def test_other_scales_in_fp32_change_nothing_but_the_last_bits():
    built, scales = scaled(dtype=torch.float32)
    scales.scale_K.copy_(2.0 ** torch.arange(8, 16))
    found = in_true_units(built, scales, gradients(built))
    for name, grad in gradients(model()).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("checkpointed", ["false", "true"])
@pytest.mark.parametrize("parts", [1, 4])
def test_fp16_gradients_are_plain_ones_up_to_its_rounding(checkpointed, parts):
    built, scales = scaled(f"train.checkpoint_activations={checkpointed}")
    assert_close_to_plain(in_true_units(built, scales, gradients(built, parts)))


def test_checkpointing_changes_no_bit():
    one, two = (
        gradients(scaled(f"train.checkpoint_activations={flag}")[0]) for flag in ("false", "true")
    )
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.slow
def test_compiled_blocks_follow_the_same_flow():
    built, scales = scaled()
    compile_blocks(built)
    assert_close_to_plain(in_true_units(built, scales, gradients(built)))
    scales.scale_K[3] *= 2.0**20
    built.zero_grad()
    bad = {name for name, grad in gradients(built).items() if not grad.isfinite().all()}
    assert "blocks.1.mlp.up.weight" in bad
    assert all(name.startswith("blocks.1.mlp.") for name in bad)


def test_layer_norms_by_another_kernel():
    calls = []

    class Counted(nn.LayerNorm):
        def forward(self, input):
            calls.append(input.dtype)
            return super().forward(input)

    built = model()
    names = list(built.state_dict())
    use_layer_norm(built, Counted)
    found = gradients(built)
    assert calls == [torch.float32] * 9 and list(built.state_dict()) == names
    assert all(found[name].equal(grad) for name, grad in gradients(model()).items())
