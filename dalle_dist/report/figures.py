"""Images of a report: the table of captions with what was generated, and curves."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from dalle_dist.data.labelled_grid import GAP, fit

CELL, CAPTION = 96, 190  # pixels
COLUMNS = 3  # plots side by side


@dataclass(frozen=True)
class Row:
    caption: str
    true: Image.Image
    samples: list[Image.Image]


def table(rows: Sequence[Row], title: str, columns: int = 2) -> Image.Image:
    """All rows in `columns` columns: caption, the true image, then the samples."""
    shown = 1 + max(len(row.samples) for row in rows)
    width = CAPTION + shown * (CELL + GAP) + 4 * GAP
    lines = -(-len(rows) // columns)
    canvas = Image.new("RGB", (columns * width, 64 + lines * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    draw.text((GAP, 8), title, fill="black", font=ImageFont.load_default(16))
    for column in range(columns):
        left = column * width + CAPTION + GAP
        draw.text((left, 40), "true", fill="gray", font=font)
        draw.text((left + CELL + 3 * GAP, 40), "generated", fill="gray", font=font)
    for i, row in enumerate(rows):
        left, top = (i // lines) * width, 64 + (i % lines) * (CELL + GAP)
        text = "\n".join(textwrap.wrap(row.caption, 24)[:4])
        draw.multiline_text((left + GAP, top + CELL // 4), text, fill="black", font=font)
        for j, image in enumerate([row.true, *row.samples]):
            at = left + CAPTION + GAP + j * (CELL + GAP) + (2 * GAP if j else 0)
            canvas.paste(fit(image, CELL), (at, top))
    return canvas


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
