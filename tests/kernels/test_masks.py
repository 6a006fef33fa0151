"""The masks against matrices written by hand, and against the properties all of them share."""

import itertools

import pytest
import torch
from dalle_kernels.masks import MASKS, AttentionMask, variants

# Image part for a 4 x 4 grid: a line per query, the keys it sees.
ROW = [
    "0", "01", "012", "0123",
    "01234", "12345", "23456", "34567",
    "45678", "56789", "6789a", "789ab",
    "89abc", "9abcd", "abcde", "bcdef",
]  # fmt: skip
COLUMN = [
    "0", "1", "2", "3",
    "04", "15", "26", "37",
    "048", "159", "26a", "37b",
    "048c", "159d", "26ae", "37bf",
]  # fmt: skip
CONV_PAPER = [
    "0", "01", "12", "023",
    "0134", "01245", "12356", "023467",
    "134578", "245689", "35679a", "4678ab",
    "5789bc", "689acd", "79abde", "8abcef",
]  # fmt: skip
CONV_CLAMP = [
    "0", "01", "12", "23",
    "014", "01245", "12356", "2367",
    "458", "45689", "5679a", "67ab",
    "89c", "89acd", "9abde", "abef",
]  # fmt: skip
CONV_CORNER = [
    "0", "01", "012", "123",
    "04", "0145", "012456", "123567",
    "048", "014589", "012456", "123567",
]  # fmt: skip


def seen(mask: AttentionMask) -> list[str]:
    return [
        "".join(f"{key:x}" for key in row.nonzero()[:, 0].tolist()) for row in mask.image_part()
    ]


@pytest.mark.parametrize(
    ("kind", "variant", "expected"),
    [
        ("row", "paper", ROW),
        ("column", "paper", COLUMN),
        ("conv", "paper", CONV_PAPER),
        ("conv", "clamp", CONV_CLAMP),
    ],
)
def test_image_part_on_a_4x4_grid(kind, variant, expected):
    assert seen(AttentionMask(kind, 6, 4, variant, kernel=3)) == expected


def test_dalle_pytorch_row_stays_in_its_line():
    lines = seen(AttentionMask("row", 6, 4, "dalle-pytorch"))
    assert lines[:6] == ["0", "01", "012", "0123", "4", "45"]


def test_dalle_pytorch_conv_hangs_up_and_left():
    lines = seen(AttentionMask("conv", 6, 4, "dalle-pytorch", kernel=3))
    assert lines[:8] == CONV_CORNER[:8]
    assert lines[15] == "567" + "9ab" + "def"


def test_torus_conv_sees_across_the_edges():
    lines = seen(AttentionMask("conv", 6, 4, "torus", kernel=3))
    assert lines[3] == "023"  # the line's other end
    assert lines[12] == "013" + "89b" + "c"  # the first line, from the last one


ALL = list(itertools.product(MASKS, variants(), [1, 3, 5]))


@pytest.mark.parametrize(("kind", "variant", "grid"), ALL)
def test_what_all_masks_share(kind, variant, grid):
    text = 4
    mask = AttentionMask(kind, text, grid, variant, kernel=3)
    dense = mask.dense()
    assert dense.shape == (text + grid**2,) * 2
    assert not dense.triu(1).any(), "a query sees the future"
    assert dense[:text, :text].equal(torch.ones(text, text, dtype=torch.bool).tril())
    assert not dense[:text, text:].any(), "text sees the image"
    assert dense[text:, :text].all(), "an image query misses text"
    assert dense.diagonal().all(), "a query misses itself"


def test_papers_sizes():
    """Allowed pairs among image tokens at 32 x 32, counted from the rules."""
    row, column = (AttentionMask(kind, 256, 32).image_part().sum() for kind in ("row", "column"))
    assert (int(row), int(column)) == (33_264, 16_896)
    assert int(AttentionMask("conv", 256, 32).image_part().sum()) == 61_344
    assert int(AttentionMask("conv", 256, 32, "clamp").image_part().sum()) == 52_354


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("rows", 4, 4), "kind"),
        (("row", 0, 4), "text, grid"),
        (("row", 4, 4, "other"), "variant"),
        (("conv", 4, 4, "paper", 4), "kernel"),
        (("conv", 4, 4, "paper", 3.0), "kernel"),
        (("row", 4.0, 4), "text"),
        (("row", 4, "4"), "grid"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        AttentionMask(*arguments)
