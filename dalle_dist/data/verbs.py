"""`dalle-dist data ACTION`; what makes or reads shards is imported when one is called."""

from __future__ import annotations

import argparse

PAPER = "--min-words 3 --language en --drop-boilerplate --max-aspect 2"
SOURCES = """SRC is a folder of pictures, each with NAME.txt beside it; a table (.tsv, .csv, .jsonl,
.parquet) of captions and of paths or images; or a folder of tars in WebDataset's layout, such as
img2dataset's. What is not used is counted by its reason, and named in OUT/skipped.jsonl."""

INDEX = """SRC is a local or s3:// folder of tars in WebDataset's layout. Index and side files go
into it, or into DST/train and DST/held-out, where whole tars are held out; the tars stay as and
where they are. What was cut off goes on when the command is given again."""
PROCESSES = "default: one for each core"
INSPECT = """What the index and the side files say, those of 200 shards where there are more. No
image is read but for the contact sheet. Whether all is sound, 'data verify' says."""


def add_data(verbs: argparse._SubParsersAction) -> None:
    actions = verbs.add_parser("data", help="make and look at image shards").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    _add_emoji(actions)
    _add_build(actions)
    _add_benchmark_sets(actions)
    _add_inspect(actions)
    _add_verify(actions)
    _add_index(actions)


def _add_index(actions: argparse._SubParsersAction) -> None:
    text = "make tars that were made elsewhere a set, where they lie"
    index = actions.add_parser("index", help=text, description=INDEX)
    index.add_argument("source", metavar="SRC")
    index.add_argument("out", nargs="?", metavar="DST")
    index.add_argument("--kind", choices=("images", "tokens"), help="default images")
    _add_split(index)
    index.add_argument("--processes", type=int, help=PROCESSES)
    index.set_defaults(handler=_index)


def _add_verify(actions: argparse._SubParsersAction) -> None:
    text = "compare all shards with their index, byte for byte"
    verify = actions.add_parser("verify", help=text, description=f"{text}; 0 when all is sound")
    verify.add_argument("folder", metavar="SHARDS")
    verify.add_argument("--processes", type=int, help=PROCESSES)
    verify.add_argument("--decode", action="store_true", help="and decode all images")
    verify.set_defaults(handler=_verify)


def _add_inspect(actions: argparse._SubParsersAction) -> None:
    text = "counts, sizes, caption lengths, contact sheet"
    inspect = actions.add_parser("inspect", help=text, description=INSPECT)
    inspect.add_argument("folder", metavar="SHARDS")
    inspect.add_argument("--contact-sheet", metavar="PNG", help="some of the images")
    inspect.add_argument(
        "--text-tokens", type=int, metavar="N", help="how many captions N tokens would cut"
    )
    inspect.add_argument("--tokenizer", metavar="FILE", help="whose tokens are counted then")
    inspect.set_defaults(handler=_inspect)


def _add_emoji(actions: argparse._SubParsersAction) -> None:
    emoji = actions.add_parser("emoji", help="render the Noto Color Emoji font with its names")
    emoji.add_argument("out", metavar="OUT")
    emoji.add_argument("--size", type=int, default=64, help="pixels per side (default 64)")
    emoji.add_argument(
        "--pairs",
        action="store_true",
        help="each emoji above, the same in a style below: the paper's image-to-image in small",
    )
    _add_split(emoji)
    emoji.set_defaults(handler=_emoji)


def _add_split(action: argparse.ArgumentParser) -> None:
    action.add_argument("--seed", type=int, default=0)
    action.add_argument("--held-out", type=float, default=0.05, metavar="SHARE")


def _add_build(actions: argparse._SubParsersAction) -> None:
    text = "from people's folders, tables or tars of pictures and captions"
    build = actions.add_parser("build", help=text, description=SOURCES)
    build.add_argument("source", metavar="SRC")
    build.add_argument("out", metavar="OUT")
    build.add_argument("--size", type=int, help="shrink to this many pixels on the shorter side")
    _add_split(build)
    build.add_argument("--samples-per-shard", type=int, default=1000, help="default 1000")
    build.add_argument("--processes", type=int, help=PROCESSES)
    build.add_argument(
        "--shard", metavar="I/N", help="make only the I-th of N parts of the shards, 1/N to N/N"
    )
    _add_captions(build)
    _add_filters(build)
    build.set_defaults(handler=_build)


def _add_captions(build: argparse.ArgumentParser) -> None:
    group = build.add_argument_group("captions")
    group.add_argument(
        "--captions-from",
        default="beside",
        metavar="beside|folder|file|TABLE",
        help="NAME.txt beside the picture (default), the name of its folder or file, or a table",
    )
    group.add_argument(
        "--caption",
        choices=("first-line", "all", "random"),
        default="first-line",
        help="of several lines: the first (default), all as one, or one at random in each epoch",
    )
    group.add_argument("--encoding", metavar="NAME", help="of captions not in UTF-8, e.g. gbk")
    group.add_argument("--image-column", metavar="NAME", help="of a table, where it is not usual")
    group.add_argument("--caption-column", metavar="NAME", help="likewise")


def _add_filters(build: argparse.ArgumentParser) -> None:
    group = build.add_argument_group("filters", "leave out what does not pass; it is counted")
    group.add_argument("--min-words", type=int, metavar="N", help="of a caption")
    group.add_argument("--language", metavar="CODE", help="of captions, e.g. en; needs py3langid")
    group.add_argument(
        "--drop-boilerplate", action="store_true", help="captions like 'photographed on DATE'"
    )
    group.add_argument("--max-aspect", type=float, metavar="RATIO", help="longer by shorter side")
    group.add_argument("--min-side", type=int, metavar="PIXELS", help="of the shorter side")
    group.add_argument("--paper-filters", action="store_true", help=f"the paper's: {PAPER}")


def _add_benchmark_sets(actions: argparse._SubParsersAction) -> None:
    coco = actions.add_parser("coco", help="from MS-COCO's captions and images, as unpacked")
    coco.add_argument("--held-out-captions", type=int, default=30_000, help="default 30000")
    coco.add_argument("--seed", type=int, default=0)
    coco.set_defaults(handler=_coco)
    cub = actions.add_parser("cub", help="from CUB-200-2011 and its captions, as unpacked")
    cub.add_argument("--test-classes", metavar="FILE", help="else FOLDER/test/filenames.pickle")
    cub.set_defaults(handler=_cub)
    for action in (coco, cub):
        action.add_argument("folder", metavar="FOLDER")
        action.add_argument("out", metavar="OUT")
        action.add_argument("--size", type=int, help="shrink to this many pixels, shorter side")


def _emoji(options: argparse.Namespace) -> None:
    from dalle_dist.data.emoji import build_emoji

    build_emoji(options.out, options.size, options.seed, options.held_out, options.pairs)


def _build(options: argparse.Namespace) -> None:
    from dalle_dist.data.build.build import Options, build
    from dalle_dist.data.build.filters import PAPER_ASPECT, PAPER_LANGUAGE, PAPER_WORDS, Filters
    from dalle_dist.data.shard_job import share

    paper = options.paper_filters
    filters = Filters(
        options.min_words or (PAPER_WORDS if paper else None),
        options.language or (PAPER_LANGUAGE if paper else None),
        options.drop_boilerplate or paper,
        options.max_aspect or (PAPER_ASPECT if paper else None),
        options.min_side,
    )
    names = [
        *("size", "seed", "held_out", "samples_per_shard", "processes"),
        *("captions_from", "caption", "encoding", "image_column", "caption_column"),
    ]
    given = {name: getattr(options, name) for name in names}
    build(options.source, options.out, Options(**given, filters=filters, part=share(options.shard)))


def _coco(options: argparse.Namespace) -> None:
    from dalle_dist.data.benchmark_sets import build_coco

    build_coco(options.folder, options.out, options.size, options.seed, options.held_out_captions)


def _cub(options: argparse.Namespace) -> None:
    from dalle_dist.data.benchmark_sets import build_cub

    build_cub(options.folder, options.out, options.size, options.test_classes)


def _inspect(options: argparse.Namespace) -> None:
    from dalle_dist.data.inspect import TextBlock, inspect

    block = TextBlock.of(options.tokenizer, options.text_tokens)
    inspect(options.folder, options.contact_sheet, block)


def _verify(options: argparse.Namespace) -> None:
    from dalle_dist.data.verify import verify

    verify(options.folder, options.processes, options.decode)


def _index(options: argparse.Namespace) -> None:
    from dalle_dist.data.index_tars import Options, index_tars

    names = ("kind", "held_out", "seed", "processes")
    given = Options(**{name: getattr(options, name) for name in names})
    index_tars(options.source, options.out, given)
