"""Completions of held-out images in a report: the upper rows given, the others generated.

Shape suffixes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from dalle_dist.data.labelled_grid import grid, to_image
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.request import sample_seed
from dalle_dist.metrics.completion import complete_images, completion_ranks, rows_kept
from dalle_dist.metrics.identification import summary
from dalle_dist.report.inputs import HeldOut
from dalle_dist.report.page import Section
from dalle_dist.report.samples import chosen_captions

COMPLETED = 1_024  # images of the measure, at most
SHOWN, COLUMNS = 24, 6  # images in the table, and its columns
CELL = 128  # pixels


def completions(
    generator: Generator, held_out: HeldOut, seed: int
) -> tuple[Section, dict[str, Any]]:
    """The section, and the figures: of the completion, and of captions alone.

    The lower part of each image is looked for among those of all, with the upper part given and
    without it: what the difference is, the model has seen in the picture.
    """
    rows = rows_kept(generator.config)
    share = rows / generator.image_tokenizer.grid
    completed_BCHW = _completed(generator, held_out, seed, rows)
    true_BCHW = held_out.images_BCHW[: len(completed_BCHW)].float() / 255
    alone_BCHW = _completed(generator, held_out, seed, 0)
    found = summary(completion_ranks(completed_BCHW, true_BCHW, share))
    alone = summary(completion_ranks(alone_BCHW, true_BCHW, share))
    figures = {
        f"images completed below their first {rows} rows of tokens": len(completed_BCHW),
        "completion R@1": round(found["r1"], 3),
        "completion R@10": round(found["r10"], 3),
        "completion R@1, nothing given but the caption": round(alone["r1"], 3),
        "completion R@10, nothing given but the caption": round(alone["r10"], 3),
    }
    image = _table(held_out, true_BCHW, completed_BCHW)
    heading = f"Completed below the first {rows} of {generator.image_tokenizer.grid} rows"
    return Section(f"{heading}: true image, completion", image=image), figures


def _completed(generator: Generator, held_out: HeldOut, seed: int, rows: int) -> Tensor:
    captions = held_out.captions[:COMPLETED]
    return complete_images(
        generator.model,
        generator.image_tokenizer,
        held_out.text_BT[: len(captions)],
        held_out.codes_BN[: len(captions)],
        [sample_seed(seed, caption, 0) for caption in captions],
        rows,
    )


def _table(held_out: HeldOut, true_BCHW: Tensor, completed_BCHW: Tensor) -> Image.Image:
    chosen = chosen_captions(held_out.captions[: len(completed_BCHW)])[:SHOWN]
    rows, captions = [], []
    for start in range(0, len(chosen), COLUMNS // 2):
        part = chosen[start : start + COLUMNS // 2]
        rows.append([to_image(x[i]) for i in part for x in (true_BCHW, completed_BCHW)])
        captions.append([text for i in part for text in (held_out.captions[i], "completed")])
    return grid(rows, cell=CELL, captions=captions)
