"""What is measured of a mask's band, against the dense masks: every small grid, kernel, variant."""

import itertools

import pytest
import torch
from dalle_kernels.masks import MASKS, AttentionMask, MaskRule, variants
from dalle_kernels.spans import span


def in_scan_order(mask):
    """bool [image, image]: the mask's image part by scan positions."""
    order = torch.tensor([mask.scan(position) for position in range(mask.image)])
    part = torch.empty(mask.image, mask.image, dtype=torch.bool)
    part[order[:, None], order[None, :]] = mask.image_part()
    return part


@pytest.mark.parametrize(("kind", "variant"), list(itertools.product(MASKS, variants())))
def test_bands_hold_and_are_tight(kind, variant):
    for grid, kernel in itertools.product(range(1, 8), (1, 3, 5, 7, 9)):
        mask = AttentionMask(kind, 3, grid, variant, kernel)
        band, part = span(mask), in_scan_order(mask)
        query, key = part.nonzero().unbind(1)
        where = f"{mask}"
        assert (query >= key).all(), where
        assert int((query - key).max()) == band.window, where
        assert band.same_line == (query // grid == key // grid).all(), where
        full = True
        for scan in range(mask.image):
            assert int(key[query >= scan].min()) >= band.first_key(scan), where
            assert int(query[key <= scan].max()) < band.queries_end(scan), where
            full &= key[query == scan].tolist() == list(range(band.first_key(scan), scan + 1))
        assert full == band.full, where


@pytest.mark.parametrize("grid", [1, 3, 4])
def test_a_scan_position_is_its_own_inverse(grid):
    mask = AttentionMask("column", 1, grid)
    scans = [mask.scan(position) for position in range(grid**2)]
    assert [scans[scan] for scan in scans] == list(range(grid**2))
    assert scans[:grid] == list(range(0, grid**2, grid))


@pytest.mark.parametrize(
    ("kind", "variant", "window", "slots", "full"),
    [
        ("row", "paper", 32, 33, True),
        ("row", "dalle-pytorch", 31, 32, True),
        ("column", "paper", 31, 1024, True),
        ("conv", "paper", 5 * 32 + 31, 192, False),
        ("conv", "clamp", 5 * 33, 166, False),
        ("conv", "torus", 1023, 1024, False),
        ("conv", "dalle-pytorch", 10 * 33, 331, False),
        ("causal", "paper", 1023, 1024, True),
    ],
)
def test_bands_at_the_papers_shape(kind, variant, window, slots, full):
    band = span(AttentionMask(kind, 256, 32, variant))
    assert (band.window, band.slots, band.full) == (window, slots, full)


@pytest.mark.parametrize(
    ("name", "rule", "fault"),
    [
        ("blind", MaskRule(lambda q, k, grid, radius: k < q), "own key"),
        ("wide", MaskRule(lambda q, k, grid, radius: k <= q, by_column=True), "its own column"),
    ],
)
def test_rules_that_no_backend_can_follow_are_refused(monkeypatch, name, rule, fault):
    monkeypatch.setitem(MASKS, name, {"paper": rule})
    with pytest.raises(ValueError, match=f"^kind: '{name}' .*{fault}"):
        span(AttentionMask(name, 1, 3))
