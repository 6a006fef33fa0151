"""`dalle-dist evaluate`; torch is imported when it is called."""

from __future__ import annotations

import argparse

from dalle_dist.config import SamplingConfig
from dalle_dist.config.root import keys_of
from dalle_dist.evaluate.options import Options
from dalle_dist.generate.verbs import add_sampling

TEXT = (
    "measure a release on shards that it was not trained on: losses, FID and inception score by "
    "blur radius, CLIP score, rerank curves, and what its image tokenizer loses"
)


def add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("evaluate", help="measure a release on held-out data", description=TEXT)
    verb.add_argument(
        "release",
        metavar="RELEASE",
        help="a release folder; of a dVAE alone: only that is measured",
    )
    verb.add_argument(
        "data", metavar="DATA", help="image shards with captions; DATA/held-out where it exists"
    )
    _add_networks(verb)
    _add_set(verb)
    add_sampling(verb)
    verb.add_argument("-o", "--out", default="evaluation", help="folder (default evaluation)")
    verb.set_defaults(handler=_evaluate)


def _add_networks(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--inception", metavar="FILE", help="inception-2015-12-05.pt (TorchScript), for FID"
    )
    verb.add_argument(
        "--inception-resize",
        choices=("tf1-bilinear", "pillow-bicubic"),
        default="tf1-bilinear",
        help="how images get its 299 pixels: as in StyleGAN (default), or as in clean-fid",
    )
    verb.add_argument("--clip", metavar="CLIP", help="a CLIP's folder, for FD (CLIP)")
    verb.add_argument(
        "--score-clip", metavar="CLIP", help="for the CLIP score; not that of --rerank (--clip)"
    )
    verb.add_argument("--rerank", metavar="CLIP", help="the CLIP that chooses among candidates")
    verb.add_argument(
        "--candidates", type=int, default=1, help="per caption: a power of two, e.g. 512 (1)"
    )
    verb.add_argument("--lpips", metavar="FILE", help="vgg16.pt (TorchScript), for LPIPS")


def _add_set(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--captions", type=int, help="sample for this many, evenly spread (default: all)"
    )
    verb.add_argument("--size", type=int, help="pixels that are compared (the release's)")
    verb.add_argument(
        "--filter", default="box", help="Pillow's filter for images of other sizes (box)"
    )
    verb.add_argument(
        "--reference",
        metavar="PATH",
        help="moments in place of DATA's images: a folder of --save-reference, or a file for "
        "radius 0 of the first network, .npz with mu and sigma too",
    )
    verb.add_argument(
        "--save-reference", metavar="FOLDER", help="keep the moments of DATA's images"
    )
    verb.add_argument(
        "--set", dest="named", choices=("coco", "cub"), help="what DATA is, if one of these"
    )


def _evaluate(options: argparse.Namespace) -> None:
    names = Options.__dataclass_fields__.keys() - {"sampling"}
    sampling = {name: getattr(options, name) for name, *_ in keys_of(SamplingConfig)}
    chosen = Options(**{name: getattr(options, name) for name in names}, sampling=sampling)
    from dalle_dist.distributed import process_group
    from dalle_dist.evaluate.run import evaluate

    evaluate(chosen, process_group.init())
