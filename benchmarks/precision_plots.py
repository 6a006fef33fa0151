"""The figures of docs/precision.md, from the curves that precision.py recorded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.precision_curves import Curve, means
from dalle_dist.report.plots import draw_scales

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
SMOOTHING = 10  # steps


def draw(names: Sequence[str], curves: dict[str, Curve], shared: int, folder: Path) -> None:
    """Some of precision-loss.png, precision-scales.png and precision-underflow.png in `folder`."""
    for name in names:
        figure = _loss(curves, shared) if name == "loss" else BLOCKWISE[name](curves)
        figure.savefig(folder / f"precision-{name}.png", format="png")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _loss(curves: dict[str, Curve], shared: int) -> Figure:
    figure = _figure(8, 4)
    axes = figure.subplots()
    for name, curve in curves.items():
        losses = list(curve.losses.values())
        ends = range(1, len(losses) + 1)
        means = [statistics.fmean(losses[max(0, end - SMOOTHING) : end]) for end in ends]
        axes.plot(list(curve.losses), means, label=name, linewidth=1)
    axes.axvline(shared, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("step (all in fp32 up to the dotted line)")
    axes.set_ylabel(f"loss, nats, mean of {SMOOTHING}")
    axes.legend(fontsize=8)
    return figure


def _scales(curves: dict[str, Curve]) -> Figure:
    figure = _figure(9, 4.5)
    axes = figure.subplots()
    shown = curves["per resblock"].scales
    draw_scales(axes, list(shown), list(shown.values()))
    for name, color in (("global", "orange"), ("global, all fp16", "red")):
        rival = curves[name].scales
        axes.plot(list(rival), [scales[0] for scales in rival.values()], color=color, label=name)
    axes.legend(fontsize=8)
    return figure


def _underflow(curves: dict[str, Curve]) -> Figure:
    figure = _figure(9, 4.5)
    for first, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        for name, curve in curves.items():
            if curve.underflow:
                shares = [100 * share for share in means(curve.underflow)[first::2]]
                axes.plot(range(1, len(shares) + 1), shares, ".", label=name)
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(-2e-5, 0.1)
        axes.set_xlabel(f"{('attention', 'MLP')[first]} resblock of layer")
    figure.axes[0].set_ylabel("gradient entries lost to underflow, %")
    figure.axes[1].legend(fontsize=8)
    return figure


BLOCKWISE = {"scales": _scales, "underflow": _underflow}
