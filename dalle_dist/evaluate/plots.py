"""Plots of what a run logs for each resblock: `dalle-dist plot scales RUN`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dalle_dist.data import storage
from dalle_dist.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = list[dict[str, Any]]


def plot(what: str, run: str) -> str:
    """Write RUN/plots/WHAT.png from the run's log.jsonl, local or remote; returns its path.

    Raises:
        DataError: the run has logged nothing of the kind.
    """
    path = storage.join(run, "log.jsonl")
    if not storage.exists(path):
        raise DataError(f"{run}: no run here (log.jsonl is missing)")
    lines = [json.loads(line) for line in storage.read_bytes(path).decode().splitlines()]
    buffer = io.BytesIO()
    PLOTS[what](run, lines).savefig(buffer, format="png")
    out = storage.join(run, f"plots/{what}.png")
    storage.write_bytes(out, buffer.getvalue())
    return out


def draw_scales(axes: Axes, updates: list[int], scales: list[list[float]]) -> None:
    """Scale of each resblock over updates (paper Fig. 12); scales are [update][resblock]."""
    from matplotlib import colormaps

    blocks = len(scales[0])
    for block, values in enumerate(zip(*scales, strict=True)):
        colour = colormaps["viridis"](block / max(blocks - 1, 1))
        style = "--" if block % 2 else "-"
        axes.plot(updates, values, style, color=colour, linewidth=1)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("update")
    axes.set_ylabel("gradient scale")
    axes.set_title("first resblock dark, last bright; attention solid, MLP dashed", fontsize=9)


def _scales(run: str, lines: Log) -> Figure:
    from matplotlib.figure import Figure

    kept = [line for line in lines if "scale" in line]
    if not kept:
        raise DataError(f"{run}: its log has no scales; only train.precision=fp16 has them")
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    scales = [line["scale"] for line in kept]
    draw_scales(figure.subplots(), [line["update"] for line in kept], scales)
    return figure


PLOTS: dict[str, Callable[[str, Log], Figure]] = {"scales": _scales}
