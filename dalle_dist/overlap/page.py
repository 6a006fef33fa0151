"""report.html: pairs in order of similarity, to choose the threshold by eye (paper 3.2)."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from dalle_dist.overlap.images import ImageSet
from dalle_dist.overlap.outputs import DIGITS, Pair, overlapping
from dalle_dist.overlap.pairs import ShownPair, drawn
from dalle_dist.report.page import Section, page

REPORT = "report.html"
TOP, SPREAD = 120, 120  # pairs that are shown: the most similar, and some of all others
AROUND = 24  # pairs on each side of the threshold
A_SECTION = 60  # pairs of one image
BARS = 60  # of the histogram
THRESHOLDS = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
TITLE = "Overlap of an evaluation set with a training set"
LEGEND = "left the evaluated image, right the nearest training image, its caption in grey"


def report(
    pairs: Sequence[Pair],
    evaluated: ImageSet,
    training: ImageSet,
    facts: Sequence[tuple[str, str]],
    threshold: float | None,
) -> str:
    """HTML text; `pairs` in their order, of which at most TOP + SPREAD are shown.

    Args:
        facts: rows of the first table.
        threshold: already chosen, or None.
    """
    sections = [Section("What was compared", facts)]
    sections.append(Section("How many images lie above a threshold", _counts(pairs, threshold)))
    values = [pair.similarity for pair in pairs]
    sections.append(Section("Similarities to the nearest image", image=_histogram(values)))
    if threshold is not None:
        first = overlapping(pairs, threshold)
        near = range(max(0, first - AROUND), min(len(pairs), first + AROUND))
        heading = f"Around the threshold {threshold:g}, which {first:,} images reach"
        sections.append(Section(heading, [("", LEGEND)], _drawn(pairs, near, evaluated, training)))
    shown = chosen(len(pairs))
    for start in range(0, len(shown), A_SECTION):
        part = shown[start : start + A_SECTION]
        image = _drawn(pairs, part, evaluated, training)
        sections.append(Section(_heading(pairs, part), [("", LEGEND)], image))
    return page(TITLE, [], sections)


def chosen(count: int) -> list[int]:
    """Which of `count` pairs are shown: the first TOP, and SPREAD evenly over the others."""
    others = max(0, count - TOP)
    spread = min(others, SPREAD)
    return [*range(count - others), *(TOP + k * others // spread for k in range(spread))]


def _counts(pairs: Sequence[Pair], threshold: float | None) -> list[tuple[str, str]]:
    lines = {*THRESHOLDS} | ({threshold} if threshold is not None else set())
    counts = [(line, overlapping(pairs, line)) for line in sorted(lines, reverse=True)]
    return [
        (f"{line:g} (--threshold)" if line == threshold else f"{line:g}", share(count, len(pairs)))
        for line, count in counts
    ]


def share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} images ({count / total:.1%})"


def _heading(pairs: Sequence[Pair], part: Sequence[int]) -> str:
    high, low = (f"{pairs[i].similarity:.{DIGITS - 1}f}" for i in (part[0], part[-1]))
    return f"Pairs {part[0] + 1:,} to {part[-1] + 1:,} of {len(pairs):,}: {high} to {low}"


def _drawn(
    pairs: Sequence[Pair], numbers: Sequence[int], evaluated: ImageSet, training: ImageSet
) -> Image.Image:
    return drawn([_shown(pairs[i], evaluated, training) for i in numbers])


def _shown(pair: Pair, evaluated: ImageSet, training: ImageSet) -> ShownPair:
    first, second = evaluated.image(pair.evaluated), training.image(pair.nearest)
    assert first is not None and second is not None  # each has been decoded before
    captions = evaluated.label(pair.evaluated).caption, training.label(pair.nearest).caption
    return ShownPair(pair.similarity, (first, second), captions)


def _histogram(values: Sequence[float]) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), dpi=110)
    axes = figure.add_subplot()
    axes.hist(values, bins=BARS)
    axes.set_xlabel("similarity to the nearest training image")
    axes.set_ylabel("evaluated images")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Image.open(buffer)
