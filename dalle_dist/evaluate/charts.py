"""Curves of an evaluation, ours beside the paper's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from dalle_dist.evaluate.figures import Figure
from dalle_dist.evaluate.paper import PUBLISHED, label

COLUMNS = 3  # plots side by side
OURS, HALVES, TRUE = "this evaluation", "two halves of the reference", "true images"
ACROSS = {"blur": "blur radius, pixels", "candidates": "best of so many candidates"}
TITLES = {"blur": "blur radius", "candidates": "candidates"}
COLOURS = {  # the same in all plots
    OURS: "C0",
    HALVES: "C7",
    TRUE: "C7",
    PUBLISHED["coco"].name: "C1",
    PUBLISHED["cub"].name: "C2",
}
DISTANCES, SCORE, CLIP = ("FID", "FD (CLIP)"), "inception score", "CLIP score"
IDENTIFICATION = "identification R@1"


@dataclass
class Panel:
    """One plot: `curves` are {label: {x: y}}, those of the paper dashed."""

    name: str
    across: str
    curves: dict[str, dict[float, float]] = field(default_factory=dict)


def panels(figures: Sequence[Figure], candidates: int, named: str | None) -> list[Panel]:
    """By blur radius, then by candidates; without those that nothing was measured of."""
    found = []
    for name in (*DISTANCES, SCORE):
        panel = _panel(figures, name, "blur")
        if panel.curves:
            _publish(panel, name, named, by_candidates=False)
            found.append(panel)
    for name in (*DISTANCES, SCORE, CLIP, IDENTIFICATION) if candidates > 1 else ():
        panel = _panel(figures, name, "candidates")
        if panel.curves:
            _publish(panel, name, named, by_candidates=True)
            found.append(panel)
    return found


def chart(shown: Sequence[Panel]) -> Image.Image:
    """All panels in one image. Read without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    canvas = Canvas(figsize=(5 * columns, 3.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(canvas)
    for i, panel in enumerate(shown):
        axes = canvas.add_subplot(rows, columns, i + 1)
        for name, points in panel.curves.items():
            style = "--" if name.startswith("paper") else "-"
            color = COLOURS[name.partition(" (")[0]]
            axes.plot(
                *zip(*points.items(), strict=True), style, color=color, marker="o", label=name
            )
        if panel.across == "candidates":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        if panel.name in DISTANCES:
            # From 0, so that a difference that is small beside the distance looks small.
            most = max(max(points.values()) for points in panel.curves.values())
            axes.set_ylim(0, 1.1 * most or None)
        axes.set_title(f"{panel.name} by {TITLES[panel.across]}", fontsize=10)
        axes.set_xlabel(ACROSS[panel.across])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return Image.open(buffer)


def _panel(figures: Sequence[Figure], name: str, across: str) -> Panel:
    """Ours, and for distances what two halves of the reference are apart."""
    most = max((f.candidates or 0 for f in figures), default=0)
    if across == "blur":
        kept = [f for f in figures if f.name == name and f.candidates == most]
    else:
        kept = [f for f in figures if f.name == name and f.candidates and not f.blur]
    panel = Panel(name, across)
    points = {float(getattr(f, across) or 0): f.value for f in kept}
    if points:
        panel.curves[OURS] = points
    halves = {float(f.blur or 0): f.halves for f in kept if f.halves is not None}
    if halves and across == "blur":
        panel.curves[HALVES] = halves
    for figure in figures:
        if figure.name == f"{name} of the true images":
            panel.curves[TRUE] = dict.fromkeys(points, figure.value)
    return panel


def _publish(panel: Panel, name: str, named: str | None, by_candidates: bool) -> None:
    """Add the paper's curves, where the paper has the same measure."""
    for key, published in PUBLISHED.items():
        curves = {
            ("FID", False): published.fid,
            (SCORE, False): published.score,
            ("FID", True): published.fid_by_candidates,
            (SCORE, True): published.score_by_candidates,
        }
        points = curves.get((name, by_candidates))
        if points:
            panel.curves[label(key, named)] = {float(x): y for x, y in points.items()}
