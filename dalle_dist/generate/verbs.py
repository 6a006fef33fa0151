"""`dalle-dist generate` and `dalle-dist complete`; torch is imported when one is called."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, get_args

from dalle_dist.choices import GeneratePrecision
from dalle_dist.config import SamplingConfig
from dalle_dist.config.root import keys_of
from dalle_dist.errors import UserError
from dalle_dist.generate.sampling_options import flag

if TYPE_CHECKING:
    from dalle_dist.distributed.process_group import Ranks
    from dalle_dist.generate.generator import Generator
    from dalle_dist.generate.job import Scorer
    from dalle_dist.generate.request import Kept


def add_generate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("generate", help="generate images for prompts")
    verb.add_argument("release", metavar="RELEASE", help="a release folder, e.g. runs/demo/release")
    _add_prompts(verb)
    _add_options(verb)
    verb.set_defaults(handler=_generate)


def add_complete(verbs: argparse._SubParsersAction) -> None:
    text = "keep a part of an image and generate the rest"
    verb = verbs.add_parser("complete", help=text, description=text)
    verb.add_argument("release", metavar="RELEASE", help="a release folder, e.g. runs/demo/release")
    verb.add_argument("image", metavar="IMAGE", help="an image file; its centred square is used")
    _add_prompts(verb)
    part = verb.add_mutually_exclusive_group(required=True)
    part.add_argument("--rows", type=int, help="keep the first rows of tokens")
    part.add_argument(
        "--keep-mask",
        metavar="PNG",
        help="keep what is white in this image; what lies below what is generated is kept, but "
        "has no influence on it",
    )
    _add_options(verb)
    verb.set_defaults(handler=_complete)


def add_samples(verbs: argparse._SubParsersAction) -> None:
    text = "draw a run's prompts from its newest checkpoint, beside the training or after it"
    verb = verbs.add_parser("samples", help=text, description=text)
    verb.add_argument("run", metavar="RUN", help="a run folder, local or remote")
    verb.add_argument("prompts", nargs="*", metavar="PROMPT", help="instead of train.prompts")
    verb.add_argument(
        "--follow", action="store_true", help="and from each that comes, until the run's last step"
    )
    verb.add_argument(
        "--every", type=float, default=30.0, metavar="SECONDS", help="between two looks (30)"
    )
    verb.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="the average (default), or not"
    )
    verb.add_argument(
        "--precision",
        choices=get_args(GeneratePrecision),
        help="of the layers (default: bf16 where the hardware computes in it, else fp32)",
    )
    verb.set_defaults(handler=_samples)


def _add_prompts(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("prompts", nargs="*", metavar="PROMPT")
    verb.add_argument("--prompts", dest="file", metavar="FILE", help="a text file, one per line")
    verb.add_argument("--captions", metavar="SHARDS", help="the captions of a folder of shards")


def _add_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-n", "--candidates", dest="n", type=int, default=1, help="images generated per prompt"
    )
    verb.add_argument("--keep", type=int, help="images kept per prompt, with --rerank (all)")
    verb.add_argument(
        "--rerank", metavar="CLIP", help="score images by this folder's CLIP; the best come first"
    )
    add_sampling(verb)
    verb.add_argument(
        "--window",
        type=int,
        help="tokens guessed and run at once, for the same images sooner; 1: none (default: what "
        "is quickest for the batch)",
    )
    verb.add_argument(
        "--format", choices=("png", "tar"), default="png", help="PNGs (default) or tar shards"
    )
    verb.add_argument("-o", "--out", default="generated", help="folder (default generated)")


def add_sampling(verb: argparse.ArgumentParser) -> None:
    """All that images depend on, prompts and release apart, and how many are made at once."""
    for name, kind, meaning in keys_of(SamplingConfig):
        choices = get_args(kind) or None
        help_ = f"{meaning.description} (default: the release's)"
        verb.add_argument(flag(name), type=str if choices else kind, choices=choices, help=help_)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--batch-size", type=int, default=64, help="images generated at once")
    verb.add_argument(
        "--precision", choices=get_args(GeneratePrecision), default="fp32", help="default fp32"
    )


def _samples(options: argparse.Namespace) -> None:
    from dalle_dist.distributed.process_group import device_of
    from dalle_dist.generate.samples import Drawing, draw
    from dalle_dist.precision.hardware import computes_in_bf16

    device = device_of()
    precision = options.precision or ("bf16" if computes_in_bf16(device) else "fp32")
    prompts = tuple(options.prompts)
    draw(
        Drawing(options.run, prompts, options.weights, precision, device),
        options.follow,
        options.every,
    )


def _generate(options: argparse.Namespace) -> None:
    _carry_out(options, lambda generator: None)


def _complete(options: argparse.Namespace) -> None:
    from dalle_dist.generate.completion import read_image

    def kept(generator: Generator) -> Kept:
        image = read_image(options.image)
        mask = None if options.keep_mask is None else read_image(options.keep_mask)
        return generator.kept(image, options.rows, mask)

    _carry_out(options, kept)


def _carry_out(options: argparse.Namespace, kept: Any) -> None:
    from dalle_dist.distributed import process_group
    from dalle_dist.generate.generator import check_numbers
    from dalle_dist.generate.job import run

    names = ("n", "keep", "seed", "batch_size", "window")
    check_numbers(**{name: getattr(options, name) for name in names})
    if options.keep is not None and (options.rerank is None or options.keep > options.n):
        raise UserError(f"--keep: {options.keep} needs --rerank, and at least as many --candidates")
    ranks = process_group.init()
    job, generator = ranks.together(lambda: _prepared(options, kept, ranks))
    count = run(job, generator, ranks)
    if ranks.rank == 0:
        where = "shards" if job.tar else f"all of them in {job.out}/grid.png"
        print(f"{count} images in {job.out}/, {where}")


def _prepared(options: argparse.Namespace, kept: Any, ranks: Ranks) -> Any:
    from dalle_dist.generate.generator import Generator
    from dalle_dist.generate.job import Job
    from dalle_dist.generate.prompts import prompts_of
    from dalle_dist.generate.request import Request

    prompts = prompts_of(options.prompts, options.file, options.captions)
    generator = Generator.load(options.release, ranks.device, options.precision)
    sampling = {name: getattr(options, name) for name, *_ in keys_of(SamplingConfig)}
    settings = generator.settings(options.seed, kept(generator), **sampling)
    request = Request(prompts, options.n, settings)
    job = Job(
        request,
        options.out,
        options.keep or options.n,
        _scorer(options.rerank, ranks),
        options.batch_size,
        options.window,
        options.format == "tar",
    )
    return job, generator


def _scorer(folder: str | None, ranks: Ranks) -> Scorer | None:
    if folder is None:
        return None
    from dalle_dist.clip.scorer import CLIPScorer

    return CLIPScorer.load(folder, ranks.device)
