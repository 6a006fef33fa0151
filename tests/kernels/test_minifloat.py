"""The 16-bit formats against exact fractions; the Triton kernels interpreted, and on a GPU."""

import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from dalle_kernels.minifloat import FORMATS, pack, unpack
from slow_optimizer import magnitudes, slow_pack, slow_unpack

FMT = pytest.mark.parametrize("fmt", FORMATS)
CODES = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)


def words(x, fmt):
    return pack(torch.tensor(x, dtype=torch.float32), fmt).tolist()


def any_floats(n):
    """fp32 of random bits: all exponents, denormals, infinities and NaN."""
    return torch.randint(-(1 << 31), 1 << 31, (n,), dtype=torch.int64).int().view(torch.float32)


def beside(x, direction):
    return float(np.nextafter(np.float32(x), np.float32(direction)))


@FMT
def test_every_code_has_its_value_and_comes_back(fmt):
    values = unpack(CODES, fmt)
    assert values.tolist() == [slow_unpack(code, fmt) for code in range(1 << 16)]
    assert pack(values, fmt).equal(CODES)


def test_the_landmarks_of_the_paper():
    ends = {"1-6-9": (15.984375, 8.690558e-19), "0-6-10": (15.9921875, 8.682088e-19)}
    for fmt, (largest, least) in ends.items():
        top = 0x7FFF if fmt == "1-6-9" else 0xFFFF
        values = unpack(torch.tensor([0, 1, top], dtype=torch.uint16), fmt)
        assert values[0] == 0 and values[2] == largest
        assert values[1].item() == pytest.approx(least, rel=1e-6)


@FMT
def test_halves_go_away_from_zero(fmt):
    table = magnitudes(fmt)[1:]
    halves = [float((a + b) / 2) for a, b in pairwise(table)]
    assert [Fraction(x) for x in halves[:3]] == [(table[i] + table[i + 1]) / 2 for i in range(3)]
    expected = list(range(2, len(table) + 1))
    assert words(halves, fmt) == expected
    assert words([beside(x, math.inf) for x in halves], fmt) == expected
    assert words([beside(x, 0) for x in halves], fmt) == [word - 1 for word in expected]
    negative = [word + (1 << 15) if fmt == "1-6-9" else 0 for word in expected]
    assert words([-x for x in halves], fmt) == negative


@FMT
def test_below_the_least_value_all_is_zero(fmt):
    least = float(magnitudes(fmt)[1])
    below = beside(least, 0)
    assert words([least, below, 2.0**-60, 1e-30, 1e-45, 0.0, -below, -1e-45], fmt) == [1] + 7 * [0]


def test_zero_keeps_its_sign_where_there_is_one():
    assert words([-0.0], "1-6-9") == [0x8000] and words([-0.0], "0-6-10") == [0]
    assert math.copysign(1, unpack(CODES[0x8000], "1-6-9")) == -1


@FMT
def test_beyond_the_largest_value_all_is_the_largest(fmt):
    top = len(magnitudes(fmt)) - 1
    largest = float(magnitudes(fmt)[-1])
    assert words([largest, beside(largest, 99), 16.0, 3e38, math.inf], fmt) == 5 * [top]
    bottom = top + (1 << 15) if fmt == "1-6-9" else 0
    assert words([-largest, -16.0, -math.inf], fmt) == 3 * [bottom]


@FMT
def test_nan_becomes_the_largest_value_whatever_its_bits(fmt):
    nan = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32)
    assert pack(nan.view(torch.float32), fmt).tolist() == 4 * [len(magnitudes(fmt)) - 1]


@FMT
def test_any_float_against_fractions(fmt):
    near = torch.randn(3000) * 2.0 ** torch.randint(-66, 8, (3000,))
    x = torch.cat([near, any_floats(3000)])
    assert pack(x, fmt).tolist() == [slow_pack(value, fmt) for value in x.tolist()]


@FMT
def test_monotone(fmt):
    x = any_floats(200_000)
    x = x[~x.isnan()].sort().values
    packed = unpack(pack(x, fmt), fmt)
    assert (packed.diff() >= 0).all() and packed.unique().numel() > 1000


@FMT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_pack_as_their_fp32(fmt, dtype):
    x = CODES.view(dtype)
    assert pack(x, fmt).equal(pack(x.float(), fmt))


@FMT
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0, 3), (3, 5, 2)])
def test_any_shape(fmt, shape):
    x = torch.rand(shape)
    packed = pack(x, fmt)
    assert packed.shape == x.shape and packed.dtype == torch.uint16
    assert packed.flatten().tolist() == [slow_pack(value, fmt) for value in x.flatten().tolist()]
    assert unpack(packed, fmt).shape == x.shape


@FMT
def test_views_and_inputs_are_read_where_they_lie(fmt):
    x = torch.randn(6, 8)
    before = x.clone()
    packed = pack(x.t()[1:, ::2], fmt)
    assert packed.is_contiguous() and packed.equal(pack(x, fmt).t()[1:, ::2])
    assert unpack(pack(x, fmt).t(), fmt).equal(unpack(pack(x, fmt), fmt).t())
    assert x.equal(before), "pack wrote to its input"
    assert pack(torch.nn.Parameter(x), fmt).equal(pack(x, fmt))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: pack(torch.zeros(2, dtype=torch.float64), "1-6-9"), "x"),
        (lambda: pack(CODES, "1-6-9"), "x"),
        (lambda: pack(torch.zeros(2), "1-5-10"), "fmt"),
        (lambda: pack(torch.zeros(2), "1-6-9", "cuda"), "backend"),
        (lambda: pack([1.0], "1-6-9"), "x"),
        (lambda: unpack(CODES.int(), "1-6-9"), "bits"),
        (lambda: unpack([1], "1-6-9"), "bits"),
        (lambda: unpack(CODES, "1-6-9", "triton"), "backend"),
    ],
)
def test_what_does_not_fit_is_named(monkeypatch, call, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()


def test_interpreted():
    """The Triton kernels, in a process of their own: the interpreter is chosen at import."""
    from test_triton_attention import interpreted

    run = interpreted("interpreted_minifloat.py")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 10, run.stdout[-500:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@FMT
def test_a_gpu_writes_the_same_words(fmt):
    x = torch.cat([any_floats(1 << 22), unpack(CODES, fmt), -unpack(CODES, fmt)])
    for backend in ("triton", "torch"):
        assert pack(x.cuda(), fmt, backend).cpu().equal(pack(x, fmt)), backend
        assert unpack(CODES.cuda(), fmt, backend).cpu().equal(unpack(CODES, fmt)), backend
