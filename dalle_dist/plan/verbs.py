"""`dalle-dist plan`; torch is imported when it is called."""

from __future__ import annotations

import argparse

from dalle_dist.config import load, preset_names
from dalle_dist.errors import ConfigError


def add_plan(verbs: argparse._SubParsersAction) -> None:
    text = "count memory, bytes and time of stage 2 on GPUs of a kind, before it runs"
    verb = verbs.add_parser(
        "plan",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Exit status 1: it does not fit.",
    )
    names = ", ".join(preset_names())
    verb.add_argument("preset", metavar="PRESET", help=f"{names}, or a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100")
    verb.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    verb.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    verb.add_argument("--gpu", default="h100-80", metavar="NAME", help="default h100-80")
    verb.add_argument(
        "--wire", type=float, metavar="GBIT", help="Gbit/s of a node; default: that of the GPU"
    )
    verb.add_argument(
        "--pairs", type=float, default=250e6, metavar="N", help="of the data set (default 250e6)"
    )
    verb.set_defaults(handler=_plan)


def _plan(options: argparse.Namespace) -> int:
    from dalle_dist.plan.hardware import hardware
    from dalle_dist.plan.items import Layout
    from dalle_dist.plan.plan import plan
    from dalle_dist.plan.text import lines

    for name in ("nodes", "gpus_per_node", "pairs", "wire"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    made = plan(
        load(options.preset, options.overrides),
        Layout(options.nodes, options.gpus_per_node),
        hardware(options.gpu, options.wire),
        pairs=int(options.pairs),
    )
    for line in lines(made):
        print(line)
    return 1 if made.misfits else 0
