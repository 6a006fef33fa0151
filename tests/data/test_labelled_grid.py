"""Grids: where images and captions lie. Images are coloured, so what is dark is text."""

import numpy as np
import pytest
from PIL import Image

from dalle_dist.data.labelled_grid import GAP, LEAST_WIDTH, LINES, _pixels, grid, wrapped

LONG = "a very long prompt that goes on and on, " * 5


def red(rows, columns):
    return [[Image.new("RGB", (8, 8), "red")] * columns for _ in range(rows)]


def text_columns(canvas, height):
    """Columns of the first `height` lines in which there is text."""
    return np.flatnonzero((np.asarray(canvas)[:height] < 128).all(axis=2).any(axis=0))


def red_boxes(canvas):
    """Top and bottom of each run of lines with red in it."""
    pixels = np.asarray(canvas)
    rows = (pixels == (255, 0, 0)).all(axis=2).any(axis=1).astype(int)
    edges = np.flatnonzero(np.diff(np.pad(rows, 1)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def red_pixels(canvas):
    return int((np.asarray(canvas) == (255, 0, 0)).all(axis=2).sum())


def test_without_captions_pictures_lie_on_an_even_grid():
    canvas = grid(red(2, 3), cell=20)
    assert canvas.size == (3 * (20 + GAP) + GAP, 2 * (20 + GAP) + GAP)
    assert red_boxes(canvas) == [(GAP, GAP + 20), (2 * GAP + 20, 2 * GAP + 40)]


def test_empty_captions_take_no_room():
    plain = grid(red(2, 3))
    assert grid(red(2, 3), captions=[[""], [" \n", "", ""]]).tobytes() == plain.tobytes()


def test_a_rows_caption_lies_above_it_and_hides_nothing():
    canvas = grid(red(2, 4), captions=[[LONG], ["gjpqy"]])
    (top, bottom), (second, end) = red_boxes(canvas)
    assert bottom - top == end - second == 96 and red_pixels(canvas) == 8 * 96 * 96
    assert top >= 3 * 11 and second - bottom >= 11 + GAP
    assert len(text_columns(canvas, top)) > 200
    pixels = np.asarray(canvas)
    assert (pixels[top - 2 : top] == 255).all()  # letters do not touch the image
    assert (pixels[second - 1] == 255).all() and (pixels[bottom : bottom + GAP] == 255).all()


def test_a_pictures_caption_stays_above_its_own_picture():
    canvas = grid(red(1, 3), captions=[["", LONG.replace(" ", ""), ""]])
    columns = text_columns(canvas, red_boxes(canvas)[0][0])
    assert columns.min() >= 2 * GAP + 96 and columns.max() < 2 * GAP + 2 * 96
    assert red_pixels(canvas) == 3 * 96 * 96


def test_a_single_pictures_caption_has_room_to_be_read():
    assert grid(red(1, 1), captions=[["a red heart"]]).width == LEAST_WIDTH
    assert grid(red(1, 1)).width == 96 + 2 * GAP


def test_captions_are_one_for_the_row_or_one_for_each_picture():
    with pytest.raises(ValueError, match="captions: 2 for a row of 3 images"):
        grid(red(1, 3), captions=[["a", "b"]])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        (" \t\n", []),
        ("a red\n heart", ["a red heart"]),
        ("a\x00b\x07c", ["abc"]),
    ],
)
def test_what_can_be_shown_is_one_text(text, lines):
    assert wrapped(text, 400) == lines


@pytest.mark.parametrize("text", [LONG, LONG.replace(" ", ""), "猫と犬が公園で" * 30, "i" * 10**6])
@pytest.mark.parametrize("width", [60, 96, 800])
def test_lines_fit_their_width_and_an_ellipsis_says_what_is_cut(text, width):
    lines = wrapped(text, width)
    assert len(lines) <= LINES and all(_pixels(line) <= width for line in lines)
    shown = "".join(lines).replace(" ", "")
    whole = text.replace(" ", "")
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]))
    assert shown == whole or _pixels(lines[-1]) > width - 60  # no line ends early


def test_words_are_kept_whole_where_they_can_be():
    assert [line.split() for line in wrapped("one two three four", _pixels("one two t"))] == [
        ["one", "two"], ["three"], ["four"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["猫", "❤️ 😀👩‍🚀", "\ud800\udfff", "\u202e\u200d\u0301", "\x7f\xad"]
)
def test_no_letter_stops_a_grid(text):
    assert red_pixels(grid(red(1, 2), captions=[[text, text]])) == 2 * 96 * 96
