"""Triton's passes of error feedback under the interpreter; run by test_error_feedback_kernels.py,
which sets it up."""

import pytest
import torch
from dalle_kernels.minifloat import add_decoded, encode_rest
from test_error_feedback_kernels import SHAPES, bits, numbers, words

# numpy, which stands in for the GPU, says so when it makes a NaN or an infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BETWEEN = pytest.mark.parametrize("between", [0, 7])
FACTORS = torch.tensor([0.3, 0.0, 1.0, 1024.0, 2.0**-20])


def by_both(call, values, *rest):
    """(values, last argument) after the same call by torch and by Triton."""
    for backend in ("torch", "triton"):
        # A clone of a strided view is dense: the storage is copied instead.
        buffer = torch.empty(0).set_(values.untyped_storage().clone())
        copy = buffer.as_strided(values.shape, values.stride(), values.storage_offset())
        copies = [given.clone() for given in rest]
        call(copy, *copies, backend=backend)
        yield bits(buffer), copies[-1]


@BETWEEN
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_and_error(shape, between):
    values, factor = numbers(shape, between=between), FACTORS[: shape[0]]
    (expected, _), (found, _) = by_both(add_decoded, values, words(shape), factor)
    assert found.equal(expected)


@BETWEEN
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rest(shape, between):
    values, sent = numbers(shape, between=between), numbers(shape, 1).contiguous()
    by = by_both(encode_rest, values, sent, torch.zeros_like(words(shape)))
    (expected, expected_codes), (found, found_codes) = by
    assert found.equal(expected) and found_codes.equal(expected_codes)


def test_a_rest_of_the_least_values():
    """Around the format's own least value, where rounding ends at zero."""
    values = numbers((2, 64, 33)) * 1e-19
    sent = torch.zeros_like(values)
    by = by_both(encode_rest, values.contiguous(), sent, torch.zeros_like(words(values.shape)))
    (_, expected), (_, found) = by
    assert found.equal(expected) and 10 < (found != 0).sum() < found.numel()


def test_infinities_and_nan_become_the_largest_and_zero():
    values = torch.tensor([[[torch.inf, -torch.inf, torch.nan, torch.inf]]])
    sent = torch.tensor([[[0.0, 1.0, 1.0, torch.inf]]])
    for _, codes in by_both(encode_rest, values, sent, torch.zeros_like(words(values.shape))):
        assert codes.tolist() == [[[0x7FFF, 0xFFFF, 0, 0]]]
