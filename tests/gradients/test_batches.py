"""Batches of a step's gradients: views of one buffer, or lists; the same results either way."""

import pytest
import torch
import torch.distributed as dist
from powersgd_runs import ERROR_DTYPES

from dalle_dist.distributed import process_group
from dalle_dist.gradients.batches import Batcher
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.algorithm import PowerSGD
from dalle_dist.gradients.powersgd.options import PowerSGDOptions

LAYERS, CPU = 3, torch.device("cpu")
PARTS = {"up": (12, 20), "tall": (20, 8), "bias": (12,)}


def pieces(flat):
    """Layer after layer, matrix after matrix, as ZeRO-3 keeps them."""
    found, at = [], 0
    for layer in range(LAYERS):
        for part, shape in PARTS.items():
            numel = torch.Size(shape).numel()
            values = flat[at : at + numel].view(shape)
            found.append(Piece(f"layers.{layer}.{part}", 0, values, layer))
            at += numel
    return found


def buffer(seed=0):
    numel = LAYERS * sum(torch.Size(shape).numel() for shape in PARTS.values())
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def apart(found):
    """The same, each in memory of its own."""
    return [Piece(p.name, p.start, p.values.clone(), p.block) for p in found]


def test_one_part_of_all_layers_is_one_batch_and_a_view_where_evenly_spaced():
    flat = buffer()
    for batch, (part, shape) in zip(Batcher(LAYERS, CPU)(pieces(flat)), PARTS.items(), strict=True):
        assert batch.kind.keys == tuple(f"layers.{layer}.{part}@0" for layer in range(LAYERS))
        assert batch.kind.slot_B.tolist() == [0, 1, 2] and batch.kind.shape == shape
        batch.read(slice(0, LAYERS)).fill_(7)
    assert (flat == 7).all()


def test_pieces_apart_are_written_one_by_one():
    given = apart(pieces(buffer()))
    for batch in Batcher(LAYERS, CPU)(given):
        rows = slice(0, LAYERS)
        batch.write(rows, 2 * batch.read(rows))
    for piece, wanted in zip(given, pieces(2 * buffer()), strict=True):
        assert torch.equal(piece.values, wanted.values)


def test_gradients_that_have_moved_are_found_again():
    batcher, flat = Batcher(LAYERS, CPU), buffer()
    batcher(pieces(flat))
    for given in (apart(pieces(flat)), pieces(flat.clone())):
        for batch in batcher(given):
            batch.zero(slice(0, LAYERS))
        assert not any(piece.values.any() for piece in given)
    assert flat.all()


def test_a_buffer_that_ends_too_soon_is_no_view():
    """Evenly spaced by chance, in memory that is another tensor's."""
    whole = torch.randn(40)
    first = torch.frombuffer(memoryview(whole.numpy())[:10], dtype=torch.float32)
    given = [Piece("layers.0.w", 0, first[:10], 0), Piece("layers.1.w", 0, whole[20:30], 1)]
    (batch,) = Batcher(LAYERS, CPU)(given)
    batch.zero(slice(0, 2))
    assert not whole[:10].any() and whole[10:20].all() and not whole[20:30].any()


def reduced(given, error_dtype):
    options = PowerSGDOptions(error_dtype=error_dtype)
    sgd = PowerSGD(dist.group.WORLD, blocks=LAYERS, rank=4, options=options)
    for step in range(3):
        fresh = pieces(buffer(step))
        for piece, new in zip(given, fresh, strict=True):
            piece.values.copy_(new.values)
        if step == 1:
            given[0].values[2, 2] = torch.nan
        matrices = [p for p in given if p.values.ndim == 2]
        sgd.reduce(matrices, [p for p in given if p.values.ndim == 1], skip=step == 2)
    sgd.reduce(matrices)
    return [p.values for p in given] + list(sgd.errors().values())


@pytest.mark.parametrize("error_dtype", ERROR_DTYPES)
def test_views_and_lists_give_the_same_gradients_and_errors(error_dtype):
    process_group.init()
    close = 1e-5 if error_dtype == "fp32" else 1e-2  # codes are rounded at random
    torch.manual_seed(0)
    views = reduced(pieces(buffer()), error_dtype)
    torch.manual_seed(0)
    lists = reduced(apart(pieces(buffer())), error_dtype)
    for view, one in zip(views, lists, strict=True):
        torch.testing.assert_close(view, one, rtol=close, atol=close)
