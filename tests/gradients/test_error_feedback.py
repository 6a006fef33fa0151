"""Error buffers of both dtypes, on batches that are one view and on lists of tensors."""

import pytest
import torch
from powersgd_runs import ERROR_DTYPES

from dalle_dist.gradients.batches import Batcher
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.error_feedback import error_buffer

LAYERS, SHAPE, CPU = 3, (6, 10), torch.device("cpu")
ALL = slice(0, LAYERS)
# Of its three resblocks the second is not to be taken; the last factor is of what is in none.
FACTORS = torch.tensor([0.5, 0.0, 4.0, 9.0])


@pytest.fixture(params=["view", "list"])
def batch(request):
    """Values 1 in all matrices, a NaN and an infinity in the second."""
    flat = torch.ones(LAYERS, 2, *SHAPE)  # every second matrix is another part's
    flat[1, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    values = [flat[i, 0] if request.param == "view" else flat[i, 0].clone() for i in range(LAYERS)]
    (made,) = Batcher(LAYERS, CPU)([Piece(f"{i}.w", 0, v, i) for i, v in enumerate(values)])
    return made


def filled(dtype, error):
    buffer = error_buffer(dtype, (LAYERS, *SHAPE), CPU)
    for row in range(LAYERS):
        buffer.write(row, torch.full(SHAPE, error))
    return buffer


def assert_each_is(found, expected):
    assert found.equal(torch.tensor(expected)[:, None, None].expand_as(found)), found


@pytest.mark.parametrize("dtype", ERROR_DTYPES)
def test_gradients_are_taken_times_the_factor_of_their_resblock(dtype, batch):
    buffer = filled(dtype, 0.25)
    buffer.accumulate(batch, FACTORS)
    assert_each_is(buffer.sum(batch, ALL), [0.75, 0.25, 4.25])


@pytest.mark.parametrize("dtype", ERROR_DTYPES)
def test_what_was_not_sent_stays(dtype, batch):
    buffer = filled(dtype, 0.25)
    buffer.accumulate(batch, FACTORS)
    left, right = torch.full((LAYERS, SHAPE[0], 1), 0.5), torch.ones(LAYERS, 1, SHAPE[1])
    buffer.subtract_sent(batch, ALL, left, right)
    assert_each_is(batch.read(ALL), [0.5, 0.5, 0.5])
    assert_each_is(torch.stack([buffer.read(i) for i in range(LAYERS)]), [0.25, -0.25, 3.75])
