"""`dalle-dist convert`; torch is imported when it is called."""

from __future__ import annotations

import argparse

from dalle_dist.errors import UserError


def add_convert(verbs: argparse._SubParsersAction) -> None:
    text = "a checkpoint, a release or another program's model to another format"
    verb = verbs.add_parser(
        "convert",
        help=text,
        description=text,
        usage="dalle-dist convert [options] SRC... DST\n       dalle-dist convert --inspect SRC...",
    )
    verb.add_argument(
        "paths",
        nargs="+",
        metavar="SRC",
        help="a run or one of its checkpoints, a release, or files of another program; the last "
        "path is what is made, a folder or a file",
    )
    verb.add_argument("--to", default="release", metavar="FORMAT", help=_formats())
    verb.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="of a checkpoint: the average (default), or the weights themselves",
    )
    verb.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights written")
    verb.add_argument(
        "--tokenizer", metavar="FILE", help="text tokenizer of another program's model"
    )
    verb.add_argument(
        "--hint",
        action="append",
        default=[],
        metavar="NAME=N",
        help="what files of another program do not say, e.g. heads=16 of a ruDALL-E",
    )
    verb.add_argument("--stage", type=int, choices=range(4), help="of ZeRO, with --to deepspeed")
    verb.add_argument("--world", type=int, metavar="N", help="ranks, with --to deepspeed")
    verb.add_argument(
        "--inspect", action="store_true", help="print what SRC holds; there is no DST"
    )
    verb.set_defaults(handler=_convert)


def _formats() -> str:
    return (
        "release (default), deepspeed, deepspeed-universal, torch, transformers, or a program: "
        "openai-dvae, dalle-pytorch, rudalle, mindalle"
    )


def _convert(options: argparse.Namespace) -> None:
    if options.inspect:
        from dalle_dist.conversion.inspect import inspect

        lines = inspect(options.paths)
    else:
        if len(options.paths) < 2:
            raise UserError("convert: name what is to be made, after what it is made of")
        from dalle_dist.conversion.run import Options, convert_any

        chosen = Options(
            options.weights,
            options.dtype,
            options.tokenizer,
            dict(map(_hint, options.hint)),
            options.stage,
            options.world,
        )
        *sources, out = options.paths
        lines = convert_any(sources, out, options.to, chosen)
    for line in lines:
        print(line, flush=True)


def _hint(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not (name and number.isdecimal()):
        raise UserError(f"--hint {text}: write NAME=N, e.g. heads=16")
    return name, int(number)
