"""What the paper published (arXiv 2102.12092, Fig. 9), to stand beside our own curves.

COCO's FIDs are those that CogView (arXiv 2105.13290, Table 1) prints of the same model; all else is
read off the figure, and off by up to a unit in FID and 0.2 in inception score. Images of 256 x 256
pixels, the best of 512 by the paper's own CLIP unless said; 30,000 captions of COCO's validation
set, and all test captions of CUB.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """FID and inception score by blur radius; those of COCO by candidates too."""

    name: str
    fid: dict[int, float]
    score: dict[int, float]
    fid_by_candidates: dict[int, float]
    score_by_candidates: dict[int, float]


COUNTS = tuple(2**power for power in range(10))
RADII = (0, 1, 2, 4, 8)


def _by(keys: tuple[int, ...], *values: float) -> dict[int, float]:
    return dict(zip(keys, values, strict=True))


PUBLISHED = {
    "coco": Published(
        "paper, COCO",
        _by(RADII, 27.5, 28.0, 45.5, 83.5, 85.0),
        _by(RADII, 17.9, 19.3, 17.7, 11.1, 5.9),
        _by(COUNTS, 34.6, 31.3, 29.4, 28.4, 27.9, 27.7, 27.6, 27.4, 27.5, 27.7),
        _by(COUNTS, 15.4, 16.3, 17.2, 17.6, 17.8, 18.0, 18.0, 18.1, 18.0, 17.9),
    ),
    "cub": Published(
        "paper, CUB",
        _by(RADII, 56.0, 50.6, 56.6, 74.0, 70.0),
        _by(RADII, 2.63, 2.81, 2.88, 2.51, 1.39),
        {},
        {},
    ),
}


def label(key: str, named: str | None) -> str:
    """How a published curve is named beside figures of the set `named`, None: of neither."""
    return PUBLISHED[key].name + ("" if key == named else " (another data set)")
