"""Filtering and scaling: what they do by torch, what they refuse, and Triton interpreted."""

import math
import re

import pytest
import torch
from dalle_kernels.scaled_gradients import filter_and_scale, unscale_and_filter

CALLS = {
    "fp32": lambda grad, scale, backend: filter_and_scale(grad, scale, torch.float32, backend),
    "fp16": lambda grad, scale, backend: filter_and_scale(grad, scale, torch.float16, backend),
    "unscale": unscale_and_filter,
}
LARGEST, LEAST = torch.finfo(torch.float32).max, 2.0**-149
ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, LARGEST, -LARGEST, LEAST, -3 * LEAST, 1e-39]
SCALES = [2.0**13, 2.0**7 * 1.4142135, 8192 * 1.00069, 3 * 2.0**24, 0.3, LEAST]


def numbers(*shape, seed=0):
    """fp32 of all magnitudes, every fourth odd: not finite, zero, largest, or subnormal."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(math.prod(shape), generator=generator)
    values *= 2.0 ** torch.randint(-140, 120, values.shape, generator=generator)
    near = values[1::4]  # around the ends of fp16, once scaled
    near *= 2.0 ** torch.randint(-40, 5, near.shape, generator=generator) / near.abs()
    odd = values[3::4]
    odd.copy_(torch.tensor(ODD).repeat(len(odd) // len(ODD) + 1)[: len(odd)])
    return values.reshape(shape)


def layouts():
    """(name, gradient): sizes beside the block's, and strides of all kinds."""
    for size in (0, 1, 1023, 1024, 1025, 4099):
        yield f"{size} values", numbers(size)
    yield "no axes", numbers(4)[1]
    yield "transposed", numbers(33, 65).mT
    yield "every other", numbers(7, 300)[:, ::2]
    yield "expanded", numbers(37)[:, None].expand(37, 41)


LAYOUTS = pytest.mark.parametrize("grad", [pytest.param(grad, id=name) for name, grad in layouts()])


def bits(values):
    """As words, -0.0 told from 0.0; all NaN are one."""
    values = values.nan_to_num(nan=77.0, posinf=math.inf, neginf=-math.inf)
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def test_a_gradient_is_filtered_before_it_is_scaled():
    grad = torch.tensor([math.nan, math.inf, -math.inf, 1.5, -100.0, 2.0**-37, 2.0**-39])
    found = filter_and_scale(grad, torch.tensor(1024.0), torch.float16)
    assert found.dtype == torch.float16
    assert found.tolist() == [0.0, 0.0, 0.0, 1536.0, -math.inf, 0.0, 0.0]
    assert filter_and_scale(grad, torch.tensor(2.0**13), torch.float16)[5].item() == 2.0**-24


def test_a_gradient_is_unscaled_before_it_is_filtered():
    grad = torch.tensor([math.nan, math.inf, -math.inf, 3.0, -LARGEST, 0.0])
    assert unscale_and_filter(grad, torch.tensor(4.0)).tolist() == [0, 0, 0, 0.75, -LARGEST / 4, 0]
    assert unscale_and_filter(grad, torch.tensor(0.5)).tolist() == [0, 0, 0, 6.0, 0, 0]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@LAYOUTS
def test_the_gradient_stays_and_strides_do_not_matter(grad, call):
    before, scale = bits(grad).clone(), torch.tensor(8200.3)
    found = call(grad, scale, "torch")
    assert bits(grad).equal(before)
    assert found.is_contiguous() and found.shape == grad.shape
    assert bits(found).equal(bits(call(grad.clone(), scale, "torch")).reshape(grad.shape))


NUMBERS, ONE = torch.zeros(3), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: filter_and_scale(NUMBERS.half(), ONE, torch.float16), "grad"),
        (lambda: unscale_and_filter(NUMBERS.double(), ONE), "grad"),
        (lambda: filter_and_scale(NUMBERS, ONE.half(), torch.float16), "scale"),
        (lambda: unscale_and_filter(NUMBERS, ONE[None]), "scale"),
        (lambda: unscale_and_filter(NUMBERS, ONE.to("meta")), "scale"),
        (lambda: filter_and_scale(NUMBERS, ONE, torch.bfloat16), "dtype"),
        (lambda: filter_and_scale(NUMBERS, ONE, torch.float16, "cuda"), "backend"),
        (lambda: unscale_and_filter(NUMBERS, ONE, "triton"), "backend"),
    ],
)
def test_what_does_not_fit_is_named(monkeypatch, call, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()


def test_interpreted():
    """The Triton kernels, in a process of their own: the interpreter is chosen at import."""
    from test_triton_attention import interpreted

    run = interpreted("interpreted_scaled_gradients.py")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 49, run.stdout[-500:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_gpu_gives_the_same_bits(scale, call):
    grad, by = numbers(1000, 1001), torch.tensor(scale)
    expected = bits(call(grad, by, "torch"))
    assert bits(call(grad.cuda(), by.cuda(), "triton").cpu()).equal(expected)
    assert bits(call(grad.cuda(), by.cuda(), "torch").cpu()).equal(expected)
