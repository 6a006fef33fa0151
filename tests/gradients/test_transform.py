"""The order of the gradient transforms, their one agreement, and what the caller adds to it."""

import math

import pytest
import torch
import torch.distributed as dist
from powersgd_oracle import on_ranks

from dalle_dist.distributed.groups import node_groups
from dalle_dist.gradients.node_mean import NodeMean
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.gradients.scaling import BlockScaling
from dalle_dist.gradients.transform import GradientTransform
from dalle_dist.precision.scales import BlockScales

SHAPE, LAYERS = (16, 24), 3
NAMES = [f"blocks.{layer}.up.weight" for layer in range(LAYERS)]
RESBLOCKS = Resblocks(LAYERS, {n: k for k, n in enumerate(NAMES)}, dict.fromkeys(NAMES, SHAPE))
KINDS = ("inactive", "scaling", "dense", "powersgd")


def build(ranks, kind, skip="block"):
    scaling = mean = None
    if kind == "scaling":
        scaling = BlockScaling(BlockScales(LAYERS, ranks.world), RESBLOCKS, ranks)
    if kind in ("dense", "powersgd"):
        mean = NodeMean(
            RESBLOCKS, node_groups(ranks, 1), ranks, rank=4 if kind == "powersgd" else 0, cuts=1,
            seed=0, options=PowerSGDOptions(),
        )  # fmt: skip
    return GradientTransform(RESBLOCKS, ranks, skip, scaling, mean)


def gradients(ranks, step):
    """One flat buffer, layer after layer, as ZeRO-3 has it; and what is in no resblock."""
    torch.manual_seed(100 * step + ranks.rank)
    parts = torch.randn(LAYERS + 1, SHAPE[0] * SHAPE[1])
    pieces = [
        Piece(name, 0, part, k)
        for k, (name, part) in enumerate(zip(NAMES, parts[:LAYERS], strict=True))
    ]
    return [*pieces, Piece("norm.weight", 0, parts[LAYERS])]


def summed(ranks, kind, bad):
    """Two steps, the second with a sum that is not finite on the last rank; and the all-reduces."""
    transform, found = build(ranks, kind), []
    for step in range(2):
        given = gradients(ranks, step)
        sums = torch.tensor([1.0 + ranks.rank, 0.5], dtype=torch.float64)
        if step == 1 and ranks.rank == ranks.world - 1:
            sums[1] = bad
        decision, numbers = transform.apply(given, 1, False, sums)
        found.append((decision.skip, numbers, [bool(g.values.any()) for g in given]))
    return found, transform.skipped


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_come_back_and_one_that_is_not_finite_skips_the_step(kind, bad):
    for (good, skipped), count in on_ranks(summed, 2, kind, bad):
        assert good[:2] == (False, [3.0, 1.0]) and all(good[2])
        assert skipped[0] and skipped[1][0] == 3.0 and not math.isfinite(skipped[1][1])
        assert count == 1 and any(skipped[2]) == (kind == "inactive")


def agreements(ranks, kind):
    """How often one `apply` asks all ranks, and how often it copies numbers to the host."""
    transform, counts = build(ranks, kind), {"world": 0, "host": 0}
    transform.apply(gradients(ranks, 0), 1, False)  # allocates, and says so to the other nodes
    all_reduce, tolist = dist.all_reduce, torch.Tensor.tolist

    def counted_all_reduce(tensor, *args, group=None, **options):
        counts["world"] += group is None
        return all_reduce(tensor, *args, group=group, **options)

    def counted_tolist(tensor):
        counts["host"] += 1
        return tolist(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted_all_reduce)
        patch.setattr(torch.Tensor, "tolist", counted_tolist)
        transform.apply(gradients(ranks, 1), 1, False, torch.ones(1, dtype=torch.float64))
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_once_and_one_copy_goes_to_the_host(kind):
    for counts in on_ranks(agreements, 2, kind):
        assert counts == {"world": 1, "host": 1}
