"""The closed forms against the dense masks: every small grid, kernel and dialect."""

import itertools

import pytest
import torch
from dalle_kernels.masks import AttentionMask
from dalle_kernels.spans import span

KINDS = ["row", "column", "conv", "causal"]
DIALECTS = ["paper", "clamp", "torus", "dalle-pytorch"]


def in_order(mask):
    """bool [image, image]: the mask's image part by positions instead of states."""
    order = torch.tensor([span(mask).position(state) for state in range(mask.image)])
    part = torch.empty(mask.image, mask.image, dtype=torch.bool)
    part[order[:, None], order[None, :]] = mask.image_part()
    return part


@pytest.mark.parametrize(("kind", "dialect"), list(itertools.product(KINDS, DIALECTS)))
def test_closed_forms_hold_and_are_tight(kind, dialect):
    for grid, kernel in itertools.product(range(1, 8), (1, 3, 5, 7, 9)):
        mask = AttentionMask(kind, 3, grid, dialect, kernel)
        band, part = span(mask), in_order(mask)
        query, key = part.nonzero().unbind(1)
        where = f"{mask}"
        assert (query >= key).all(), where
        assert int((query - key).max()) == band.back, where
        for position in range(mask.image):
            assert int(key[query >= position].min()) >= band.first_key(position), where
            assert int(query[key <= position].max()) < band.queries_end(position), where
            if band.own_line:
                first = position // grid * grid
                assert key[query == position].tolist() == list(range(first, position + 1)), where


@pytest.mark.parametrize("grid", [1, 3, 4])
def test_a_position_is_its_own_inverse(grid):
    band = span(AttentionMask("column", 1, grid))
    positions = [band.position(state) for state in range(grid**2)]
    assert [positions[p] for p in positions] == list(range(grid**2))
    assert positions[:grid] == list(range(0, grid**2, grid))


def test_slots_of_the_papers_shapes():
    """Rows need 33 slots, the 11 x 11 convolution 192, clamped at the edges 166 (kernels.md)."""
    slots = {
        (kind, dialect): span(AttentionMask(kind, 256, 32, dialect)).slots
        for kind, dialect in (("row", "paper"), ("conv", "paper"), ("conv", "clamp"))
    }
    assert list(slots.values()) == [33, 192, 166]
    assert span(AttentionMask("column", 256, 32)).slots == 32
