"""`dalle-dist overlap`; torch is imported when it is called."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_dist.distributed.process_group import Ranks
    from dalle_dist.overlap.found import Found
    from dalle_dist.overlap.job import Job


def add_overlap(verbs: argparse._SubParsersAction) -> None:
    text = "which images of an evaluation set are in the training set too, by a CLIP"
    verb = verbs.add_parser("overlap", help=text, description=text)
    verb.add_argument("evaluated", metavar="EVALUATED", help="a folder of image shards")
    verb.add_argument("training", metavar="TRAINING", help="a folder of image shards")
    verb.add_argument("--clip", required=True, help="the folder of a CLIP")
    verb.add_argument(
        "--threshold",
        type=float,
        help="similarity from which on an image overlaps; the keys of the others go to keep.txt "
        "(default: none yet; choose one by the report, and call again)",
    )
    verb.add_argument(
        "--chunk",
        type=int,
        help="training images between which a call that is cut off can go on, a multiple of 64 "
        "(default: by the size of the set)",
    )
    verb.add_argument("-o", "--out", default="overlap", help="folder (default overlap)")
    verb.set_defaults(handler=_overlap)


def _overlap(options: argparse.Namespace) -> None:
    from dalle_dist.distributed import process_group
    from dalle_dist.overlap.job import check_numbers, run

    check_numbers(options.threshold, options.chunk)
    ranks = process_group.init()
    job, encoder = ranks.together(lambda: _prepared(options, ranks))
    found = run(job, encoder, ranks)
    if ranks.rank == 0:
        _tell(job, found)


def _prepared(options: argparse.Namespace, ranks: Ranks) -> Any:
    from dalle_dist.clip.scorer import CLIPScorer
    from dalle_dist.overlap.images import ImageSet
    from dalle_dist.overlap.job import Job

    evaluated, training = ImageSet(options.evaluated), ImageSet(options.training)
    scorer = CLIPScorer.load(options.clip, ranks.device)
    clip, threshold, chunk = scorer.fingerprint, options.threshold, options.chunk
    return Job(evaluated, training, clip, options.out, threshold, chunk), scorer


def _tell(job: Job, found: Found) -> None:
    from dalle_dist.overlap.job import facts
    from dalle_dist.overlap.outputs import KEEP, overlapping, pairs_of
    from dalle_dist.overlap.page import REPORT, share

    for name, fact in facts(job, found):
        print(f"{name}: {fact}")
    if job.threshold is not None:
        pairs = pairs_of(found)
        count = share(overlapping(pairs, job.threshold), len(pairs))
        print(f"threshold {job.threshold:g}: {count} overlap; the others: {job.out}/{KEEP}")
    print(f"pairs in order of similarity: {job.out}/{REPORT}")
