"""Triton's 16-bit formats under the interpreter; run by test_minifloat.py, which sets it up."""

import pytest
import torch
from dalle_kernels.minifloat import FORMATS, pack, unpack
from test_minifloat import CODES, any_floats, beside

FMT = pytest.mark.parametrize("fmt", FORMATS)


@FMT
def test_every_code(fmt):
    values = unpack(CODES, fmt, "torch")
    # As words: -0.0 and 0.0 are equal numbers.
    assert unpack(CODES, fmt, "triton").view(torch.int32).equal(values.view(torch.int32))
    assert pack(values, fmt, "triton").equal(CODES)


@FMT
def test_any_float(fmt):
    x = torch.cat([any_floats(20_000), torch.randn(20_000) * 1e-18, torch.randn(5_000) * 16])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])])
    assert pack(x, fmt, "triton").equal(pack(x, fmt, "torch"))


@FMT
def test_halves(fmt):
    values = unpack(CODES[1 : 1 << 15], fmt, "torch")
    halves = (values[1:] + values[:-1]) / 2
    below = torch.tensor([beside(x, 0) for x in halves[:2000].tolist()])
    for x in (halves, -halves, below):
        assert pack(x, fmt, "triton").equal(pack(x, fmt, "torch"))


@FMT
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1023,), (2, 3, 171), (1025,)])
def test_any_shape(fmt, shape):
    x = torch.randn(shape)
    assert pack(x, fmt, "triton").equal(pack(x, fmt, "torch"))
    packed = pack(x, fmt, "torch")
    assert unpack(packed, fmt, "triton").equal(unpack(packed, fmt, "torch"))


def test_views_and_narrow_floats():
    x = torch.randn(6, 8)
    for given in (x.t(), x[:, ::2], x.half()):
        assert pack(given, "1-6-9", "triton").equal(pack(given, "1-6-9", "torch"))
