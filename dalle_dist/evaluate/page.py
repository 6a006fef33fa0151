"""report.html of an evaluation: pictures, curves beside the paper's, and every figure."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from dalle_dist.data.labelled_grid import GAP, grid
from dalle_dist.evaluate.charts import chart, panels
from dalle_dist.evaluate.data import spread
from dalle_dist.evaluate.figures import Figure, table
from dalle_dist.evaluate.paper import PUBLISHED, RADII, label
from dalle_dist.evaluate.samples import Samples
from dalle_dist.evaluate.subject import Subject
from dalle_dist.evaluate.tokenizer import reconstructed
from dalle_dist.report.page import Section, page

CAPTIONS, SHOWN = 24, 4  # of the table of pictures: rows, and generated images of each
BLOCKS = 3  # of rows side by side
PAIRS = 24  # images that are shown with their reconstructions
HALVES = (
    "what so few images make by themselves, of half as many each: a figure of all images may lie "
    "below, the more so as the captions are those of the reference images"
)


def html(
    subject: Subject,
    samples: Samples | None,
    figures: Sequence[Figure],
    warnings: Sequence[str],
    left_out: Sequence[tuple[str, str]],
) -> str:
    """The whole page, images inside it."""
    sections = []
    if samples is not None:
        sections.append(_pictures(subject, samples))
    shown = panels(figures, subject.options.candidates, subject.options.named)
    if shown:
        note = [("two halves of the reference", HALVES)]
        sections.append(Section("Curves, beside the paper's", note, chart(shown)))
    sections.append(Section("Figures", table(figures)))
    if any(figure.name == "FID" for figure in figures):
        sections.append(_published(subject))
    sections.append(_reconstructions(subject))
    sections.append(Section("What the figures are of", _facts(subject, figures)))
    if left_out:
        sections.append(Section("Left out", left_out))
    return page(f"Evaluation of {subject.options.release}", warnings, sections)


def _pictures(subject: Subject, samples: Samples) -> Section:
    """Captions evenly spread over those that were sampled for."""
    chosen = spread(list(range(len(samples.captions))), CAPTIONS)
    rows = []
    for caption in chosen:
        # Stable: of equal scores the lower index, as the best is chosen.
        order = samples.scores_CN[caption].argsort(descending=True, stable=True)
        best = order[:SHOWN].tolist()
        made = samples.images([caption] * len(best), best)
        rows.append([subject.true(samples.numbers[caption]), *made])
    texts = [[samples.captions[caption]] for caption in chosen]
    n = subject.options.candidates
    how = f"the best {min(n, SHOWN)} of {n}, best first" if n > 1 else "one image, not chosen"
    return Section(
        "Captions and images",
        [("each row", f"the true image, then {how}")],
        _beside(rows, texts),
    )


def _beside(rows: list[list[Image.Image]], texts: list[list[str]]) -> Image.Image:
    each = -(-len(rows) // BLOCKS)
    starts = range(0, len(rows), each)
    blocks = [grid(rows[s : s + each], captions=texts[s : s + each]) for s in starts]
    width = sum(block.width for block in blocks) + 3 * GAP * (len(blocks) - 1)
    canvas = Image.new("RGB", (width, max(block.height for block in blocks)), "white")
    left = 0
    for block in blocks:
        canvas.paste(block, (left, 0))
        left += block.width + 3 * GAP
    return canvas


def _published(subject: Subject) -> Section:
    rows = []
    for key, published in PUBLISHED.items():
        for measure, values in (("FID", published.fid), ("inception score", published.score)):
            text = ", ".join(f"{values[radius]:g}" for radius in RADII)
            rows.append((f"{label(key, subject.options.named)}: {measure}", text))
    radii = ", ".join(map(str, RADII))
    return Section(f"Published by the paper, at blur radius {radii} of 256 pixels", rows)


def _reconstructions(subject: Subject) -> Section:
    numbers = spread(list(range(len(subject.data))), PAIRS)
    originals = [subject.own_preparation(subject.data.image(i)) for i in numbers]
    made = reconstructed(subject.image_tokenizer, subject.floats(originals))
    half = -(-len(numbers) // 2)
    rows = []
    for start in range(0, len(numbers), half):
        rows += [originals[start : start + half], made[start : start + half]]
    return Section("Reconstructions: originals above, through the codes below", image=grid(rows))


def _facts(subject: Subject, figures: Sequence[Figure]) -> list[tuple[str, str]]:
    """Once what the lines of figures.csv say each."""
    networks = {f.network: f.fingerprint for f in figures if f.network}
    references = {f.reference for f in figures if f.reference}
    return [
        *((name, value) for name, value in subject.common().items() if value),
        ("compared after", subject.preparation.to_json()),
        ("image tokenizer's input", subject.own_preparation.to_json()),
        *(("reference", name) for name in sorted(references)),
        *networks.items(),
    ]
