"""The contrastive loss: by hand, among captions that are the same, and of ranks together."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from dalle_dist.clip.captions import caption_ids, hashed
from dalle_dist.clip.loss import contrastive_loss
from dalle_dist.distributed.gather_rows import gather_rows
from dalle_dist.testing import run_distributed
from dalle_dist.text_tokenizer.bpe import train_tokenizer

SCALE = torch.tensor(3.0)


def loss_of(both_N2D, captions=None):
    captions_N = torch.arange(len(both_N2D)) if captions is None else torch.tensor(captions)
    return contrastive_loss(both_N2D, both_N2D, captions_N, captions_N, SCALE)


def pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, 2, 5, generator=generator), dim=-1)


def test_two_pairs_by_hand():
    """Image 0 lies on caption 0, image 1 halfway; the captions are at right angles."""
    x, y = torch.eye(2)
    both_N2D = torch.stack([torch.stack([x, x]), torch.stack([(x + y) / math.sqrt(2), y])])
    half = 3 / math.sqrt(2)
    images = [math.log(1 + math.exp(-3)), math.log(2)]
    captions = [math.log(1 + math.exp(half - 3)), math.log(1 + math.exp(-half))]
    assert loss_of(both_N2D).item() == pytest.approx((sum(images) + sum(captions)) / 2, rel=1e-6)


def test_pairs_with_the_same_caption_are_not_told_apart():
    both_N2D = pairs(3)
    both_N2D[1, 1] = both_N2D[0, 1]
    rest = [loss_of(both_N2D[[0, 2]]), loss_of(both_N2D[[1, 2]])]
    both = loss_of(both_N2D, [7, 7, 8])
    third = [0, 0]
    for way, (own, other) in enumerate(((0, 1), (1, 0))):
        logits_N = 3 * both_N2D[:, other] @ both_N2D[2, own]
        third[way] = torch.logsumexp(logits_N, 0) - logits_N[2]
    twice = [
        torch.logsumexp(3 * both_N2D[[k, 2], other] @ both_N2D[2, own], 0)
        - 3 * both_N2D[2, other] @ both_N2D[2, own]
        for k in (0, 1)
        for own, other in ((0, 1), (1, 0))
    ]
    expected = sum(rest) - sum(twice) / 2 + sum(third) / 2
    torch.testing.assert_close(both, expected)
    assert both < loss_of(both_N2D, [6, 7, 8])


def test_alone_with_one_caption_nothing_is_to_be_learned():
    assert loss_of(pairs(3), [1, 1, 1]).item() == 0


def _share(ranks, leaf_N2D, captions_N):
    rows = len(leaf_N2D) // ranks.world
    mine = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
    leaf_B2D = leaf_N2D[mine].clone().requires_grad_()
    both_B2D = normalize(leaf_B2D, dim=-1)
    scale = SCALE.clone().requires_grad_()
    captions_B = captions_N[mine]
    both_N2D = gather_rows(both_B2D)
    loss = contrastive_loss(both_B2D, both_N2D, captions_B, gather_rows(captions_B), scale)
    loss.backward()
    return loss.item(), leaf_B2D.grad.tolist(), scale.grad.item()


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_ranks_add_up_to_the_loss_and_gradients_of_one(world):
    leaf_N2D = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1))
    captions_N = torch.tensor([1, 2, 3, 4, 1, 5])
    whole_N2D = leaf_N2D.clone().requires_grad_()
    scale = SCALE.clone().requires_grad_()
    both_N2D = normalize(whole_N2D, dim=-1)
    loss = contrastive_loss(both_N2D, both_N2D, captions_N, captions_N, scale)
    loss.backward()
    losses, gradients, scales = zip(
        *run_distributed(_share, world, leaf_N2D, captions_N), strict=True
    )
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(scales) == pytest.approx(scale.grad.item(), rel=1e-5)
    found_N2D = torch.cat([torch.tensor(rows) for rows in gradients])
    torch.testing.assert_close(found_N2D, whole_N2D.grad, rtol=1e-4, atol=1e-6)


def test_captions_end_with_the_end_and_are_known_by_what_is_left_of_them():
    tokenizer = train_tokenizer(["red heart", "blue car"], 300)
    red, empty = tokenizer.encode("red"), caption_ids(tokenizer, "", 4, 300)
    assert empty == [300, 0, 0, 0]
    assert caption_ids(tokenizer, "red", 8, 300) == [*red, 300, *[0] * (7 - len(red))]
    long = caption_ids(tokenizer, "red heart blue car " * 9, 8, 300)
    assert (len(long), long[-1]) == (8, 300)
    same = caption_ids(tokenizer, "Red heart blue car " * 20, 8, 300)
    assert hashed(long) == hashed(same) != hashed(empty)
    assert -(2**63) <= hashed(long) < 2**63
