"""An evaluation from beginning to end: `figures.csv` and `report.html` in one folder.

By any number of ranks, which give the same figures. What a call that was cut off has sampled is not
sampled again; all else takes little time beside it and is measured anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dalle_dist import storage
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import UserError
from dalle_dist.evaluate import samples as candidates
from dalle_dist.evaluate.distances import Distances
from dalle_dist.evaluate.figures import Figure, table, to_csv
from dalle_dist.evaluate.generated import generated_figures
from dalle_dist.evaluate.losses import loss_figures
from dalle_dist.evaluate.options import Options
from dalle_dist.evaluate.page import html
from dalle_dist.evaluate.samples import Samples
from dalle_dist.evaluate.subject import Subject
from dalle_dist.evaluate.tokenizer import tokenizer_figures
from dalle_dist.evaluation.blur import RADII
from dalle_dist.evaluation.self_checks import known_pair

CSV, REPORT = "figures.csv", "report.html"
OURS = re.compile(rf"{CSV}|{REPORT}|{candidates.FOLDER}/.*")
PAPER_SIZE = 256  # pixels


def evaluate(options: Options, ranks: Ranks) -> list[Figure]:
    """All figures, on every rank; rank 0 prints and writes them.

    Raises:
        UserError: the folder holds something else, or as `Subject.load` does.
    """
    ranks.on_main(lambda: _refuse_foreign(options.out))
    subject = ranks.together(lambda: Subject.load(options, ranks))
    distances = _references(subject)
    figures = tokenizer_figures(subject, distances)
    samples = None
    if subject.generator is not None and subject.settings is not None:
        figures = loss_figures(subject, subject.generator) + figures
        samples = Samples(subject, subject.generator, subject.settings)
        figures += generated_figures(subject, samples, distances)
    if distances:
        figures.append(_known())
    ranks.on_main(lambda: _write(subject, samples, figures))
    return figures


def _references(subject: Subject) -> list[Distances]:
    """Of each network, with the moments of the reference images at all radii that are asked for."""
    options, found = subject.options, []
    radii = RADII if subject.generator is not None else RADII[:1]

    for number, network in enumerate(subject.networks):
        one_file = (options.reference or "").endswith((".npz", ".safetensors"))
        given = None if one_file and number else options.reference
        distances = Distances(
            network, subject.preparation, subject.ranks, given, options.save_reference
        )
        source = f"all {len(subject.data)} images of {subject.data.folder}"
        distances.refer(
            lambda numbers: [subject.true(i) for i in numbers], len(subject.data), radii, source
        )
        found.append(distances)
    return found


def _known() -> Figure:
    found, right = known_pair()
    return Figure("self-check: a known pair of Gaussians", found, note=f"right: {right:.10g}")


def _refuse_foreign(folder: str) -> None:
    for name in storage.list_files(folder):
        if not OURS.fullmatch(name):
            raise UserError(
                f"{folder}: holds {name}, which is not of an evaluation; choose another --out"
            )


def _write(subject: Subject, samples: Samples | None, figures: Sequence[Figure]) -> None:
    out, warnings, left_out = subject.options.out, _warnings(subject, figures), _left_out(subject)
    storage.write_bytes(storage.join(out, CSV), to_csv(figures, subject.common()))
    page = html(subject, samples, figures, warnings, left_out)
    storage.write_bytes(storage.join(out, REPORT), page.encode())
    for title, value in table(figures):
        print(f"{title:45} {value}")
    for name, why in left_out:
        print(f"left out: {name} ({why})")
    for line in warnings:
        print(f"WARNING: {line}")
    print(storage.join(out, REPORT))


def _warnings(subject: Subject, figures: Sequence[Figure]) -> list[str]:
    size, found = subject.preparation.size, []
    if any("too few" in figure.note for figure in figures):
        found.append("too few images for some distances or scores; each of them says so")
    if any(figure.blur for figure in figures) and size != PAPER_SIZE:
        found.append(
            f"blur radii are pixels of {size} x {size} images; the paper's are of {PAPER_SIZE}"
        )
    if any(figure.name == "FD (CLIP)" for figure in figures):
        found.append("FD (CLIP) has another scale than FID: compare it with FD (CLIP) alone")
    return found


def _left_out(subject: Subject) -> list[tuple[str, str]]:
    """Measures that this call cannot have, and the option that each of them needs."""
    options = subject.options
    needs = [
        ("FID, inception score", options.inception is None, "--inception FILE"),
        ("FD (CLIP)", options.clip is None, "--clip CLIP"),
        ("LPIPS", subject.lpips is None, "--lpips FILE"),
    ]
    if subject.generator is None:
        needs.append(("all of generated images", True, "the release of a transformer's run"))
    else:
        needs += [
            ("CLIP score", subject.scorer is None, "--score-clip CLIP"),
            ("rerank curves", options.rerank is None, "--rerank CLIP --candidates N"),
        ]
    return [(name, f"needs {option}") for name, missing, option in needs if missing]
