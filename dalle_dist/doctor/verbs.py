"""`dalle-dist doctor`; torch is imported when it is called."""

from __future__ import annotations

import argparse

from dalle_dist.config import load, preset_names
from dalle_dist.stages import STAGES


def add_doctor(verbs: argparse._SubParsersAction) -> None:
    text = "find on all ranks what would stop or slow down a run, before it starts"
    verb = verbs.add_parser(
        "doctor",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Start it as the run will be started. Exit "
        "status 1: something failed.",
    )
    names = ", ".join(preset_names())
    verb.add_argument("preset", nargs="?", metavar="PRESET", help=f"{names}, or a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. paths.run=RUN")
    verb.add_argument(
        "--for",
        dest="stage",
        default="train",
        choices=[stage.verb for stage in STAGES.values()],
        help="the verb that will run (default train)",
    )
    verb.add_argument("--quick", action="store_true", help="leave out network and read speed")
    verb.set_defaults(handler=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from dalle_dist.distributed import process_group
    from dalle_dist.doctor.checks import examine

    ranks = process_group.init()
    config = None
    if options.preset is not None:
        config = ranks.together(lambda: load(options.preset, options.overrides))
    report = examine(config, ranks, verb=options.stage, quick=options.quick, tell=print)
    if report.failed and ranks.world > 1:
        # One of them may hang in a collective: the process group cannot be taken apart.
        process_group.leave(1)
    return int(report.failed)
