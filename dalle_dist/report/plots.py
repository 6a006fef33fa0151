"""Plots of what a run logs by resblock or matrix: `dalle-dist plot scales|compression RUN`."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dalle_dist import storage
from dalle_dist.errors import DataError
from dalle_dist.train.run import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = list[dict[str, Any]]


def plot(what: str, run: str) -> str:
    """Write RUN/plots/WHAT.png from the run's log.jsonl, local or remote; returns its path.

    Raises:
        DataError: the run has logged nothing of the kind.
    """
    if not storage.exists(storage.join(run, "log.jsonl")):
        raise DataError(f"{run}: no run here (log.jsonl is missing)")
    buffer = io.BytesIO()
    PLOTS[what](run, read_log(run)).savefig(buffer, format="png")
    out = storage.join(run, f"plots/{what}.png")
    storage.write_bytes(out, buffer.getvalue())
    return out


def draw_scales(axes: Axes, steps: list[int], scales: list[list[float]]) -> None:
    """Scale of each resblock over steps (paper Fig. 12); scales are [step][resblock]."""
    _draw(axes, steps, scales, [("attention", "-"), ("MLP", "--")])
    axes.set_yscale("log", base=2)
    axes.set_ylabel("gradient scale")


def _draw(
    axes: Axes, steps: list[int], values: list[list[float]], kinds: list[tuple[str, Any]]
) -> None:
    """One line per column of values; kinds (name, line style) take turns from first to last."""
    from matplotlib import colormaps

    count = len(values[0])
    for number, column in enumerate(zip(*values, strict=True)):
        color = colormaps["viridis"](number / max(count - 1, 1))
        name, style = kinds[number % len(kinds)]
        label = name if number < len(kinds) else None
        axes.plot(steps, column, linestyle=style, color=color, linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.legend(fontsize=8, title="first layers dark, last bright", title_fontsize=8)


def _scales(run: str, lines: Log) -> Figure:
    from matplotlib.figure import Figure

    kept = _with("scale", lines, f"{run}: its log has no scales; train.precision=fp16 has them")
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    scales = [line["scale"] for line in kept]
    draw_scales(figure.subplots(), [line["step"] for line in kept], scales)
    return figure


def _compression(run: str, lines: Log) -> Figure:
    """Above, ||what is left|| / ||gradient + error|| of each matrix; below, what was sent."""
    from matplotlib.figure import Figure

    missing = f"{run}: its log has no compression; parallel.between_nodes=powersgd has it"
    kept = _with("compression_error", lines, missing)
    steps = [line["step"] for line in kept]
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, height_ratios=[3, 1], sharex=True)
    styles = [("qkv", "-"), ("out", "--"), ("up", "-."), ("down", ":")]
    _draw(above, steps, [line["compression_error"] for line in kept], styles)
    above.set_ylabel("relative error of what is sent")
    for name in ("dense", "sent"):
        below.plot(steps, [line[f"{name}_megabytes"] for line in kept], label=name)
    last = kept[-1]
    saved = 1 - last["sent_megabytes"] / last["dense_megabytes"]
    below.set_title(f"{saved:.1%} of the bytes saved", fontsize=9)
    below.set_yscale("log")
    below.set_ylabel("MB per step, all ranks")
    below.legend(fontsize=8)
    return figure


def _with(key: str, lines: Log, missing: str) -> Log:
    kept = [line for line in lines if key in line]
    if not kept:
        raise DataError(missing)
    return kept


PLOTS: dict[str, Callable[[str, Log], Figure]] = {"scales": _scales, "compression": _compression}
