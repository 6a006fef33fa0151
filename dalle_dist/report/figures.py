"""Images of a report: the table of captions with what was generated, and curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from dalle_dist.data.labelled_grid import GAP, fit, font, wrapped

CELL, CAPTION = 96, 190  # pixels
TITLE, TEXT, SMALL = 16, 13, 11  # pixels: size of letters
LEADING = 4  # pixels between lines
HEAD = 88  # pixels above the first row: title, note, and headings of up to two lines
HEADINGS_TOP = 52
HEADINGS = ("true", "nearest in training", "generated")
COLUMNS = 3  # plots side by side


@dataclass(frozen=True)
class Row:
    """A caption, its true image, the training image nearest to the first sample, the samples."""

    caption: str
    true: Image.Image
    nearest: Image.Image
    nearest_caption: str
    samples: list[Image.Image]

    @property
    def images(self) -> list[Image.Image]:
        return [self.true, self.nearest, *self.samples]


def table(rows: Sequence[Row], title: str, note: str, columns: int = 2) -> Image.Image:
    """All rows in `columns` columns; below each caption, in grey, the nearest image's own."""
    width = _left(max(len(row.images) for row in rows)) + 2 * GAP
    lines = -(-len(rows) // columns)
    canvas = Image.new("RGB", (columns * width, HEAD + lines * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 8), title, fill="black", font=font(TITLE))
    draw.text((GAP, 32), note, fill="dimgray", font=font(SMALL))
    for i, row in enumerate(rows):
        left, top = (i // lines) * width, HEAD + (i % lines) * (CELL + GAP)
        if top == HEAD:
            for j, heading in enumerate(HEADINGS):
                _write(draw, (left + _left(j), HEADINGS_TOP), heading, CELL, SMALL, "dimgray")
        _captions(draw, row, left + GAP, top)
        for j, image in enumerate(row.images):
            canvas.paste(fit(image, CELL), (left + _left(j), top))
    return canvas


def _left(number: int) -> int:
    """Where image `number` of a row starts: wider gaps lie before the nearest and the generated."""
    return CAPTION + GAP + number * (CELL + GAP) + 2 * GAP * min(number, 2)


def _captions(draw: ImageDraw.ImageDraw, row: Row, left: int, top: int) -> None:
    width = CAPTION - 2 * GAP
    below = _write(draw, (left, top), row.caption, width, TEXT, "black")
    nearest = f"nearest: {row.nearest_caption}"
    _write(draw, (left, below + LEADING), nearest, width, SMALL, "dimgray")


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, size: int, fill: str
) -> int:
    """At most three lines of at most `width` pixels; returns where the next would stand."""
    left, top = at
    for line in wrapped(text, width, size):
        draw.text((left, top), line, fill=fill, font=font(size))
        top += size + LEADING
    return top


def curves(log: list[dict[str, float]], panels: Sequence[dict[str, str]]) -> Image.Image:
    """One plot per panel, a panel being {key of log.jsonl: label}; without those not logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = set().union(*log)
    panels = [panel for panel in panels if logged & panel.keys()]
    columns = max(1, min(COLUMNS, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.2 * columns, 3 * rows), dpi=110)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for key, label in panel.items():
            points = [(line["step"], line[key]) for line in log if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
