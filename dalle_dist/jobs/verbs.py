"""`dalle-dist slurm`, `submit` and `progress`."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable

from dalle_dist.config import Config, load, preset_names
from dalle_dist.errors import ConfigError
from dalle_dist.stages import STAGES, stage_of

# What `submit` can fill in: scripts whose arguments are those of a preset.
STAGE_VERBS = [stage.verb for stage in STAGES.values()]
# sbatch's own options, by their long names, that have one of ours.
SETTINGS = ("account", "partition", "qos", "constraint", "time", "mem", "cpus-per-task", "job-name")
Parse = Callable[[list[str]], argparse.Namespace]


def add_jobs(verbs: argparse._SubParsersAction, parse: Parse) -> None:
    """Args: parse: a command line of `dalle-dist` without its first word."""
    _add_slurm(verbs)
    _add_submit(verbs)
    text = "how far a command's work is: finished, stopped, a step, or its number of files"
    verb = verbs.add_parser("progress", help=text, description=text)
    verb.add_argument(
        "--in-vain",
        action="store_true",
        help="count a start that came no further; print how many there were in a row",
    )
    verb.add_argument("command", nargs=argparse.REMAINDER, metavar="VERB ...")
    verb.set_defaults(handler=lambda options: _progress(options, parse))


def _add_slurm(verbs: argparse._SubParsersAction) -> None:
    text = "write the Slurm scripts into a folder, for sbatch"
    verb = verbs.add_parser("slurm", help=text, description=text)
    verb.add_argument("folder", nargs="?", default="slurm", metavar="FOLDER")
    verb.set_defaults(handler=_slurm)


def _add_submit(verbs: argparse._SubParsersAction) -> None:
    text = "plan a training, write its Slurm script into the run folder, and submit it"
    verb = verbs.add_parser("submit", help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.add_argument("preset", metavar="PRESET", help=f"{', '.join(preset_names())}, or a file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100")
    verb.add_argument("--verb", dest="stage", choices=STAGE_VERBS, default="train", help="(train)")
    verb.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    verb.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="default 8; 0: CPUs alone"
    )
    verb.add_argument(
        "--tasks-per-node", type=int, metavar="N", help="default: one for each GPU, or 1"
    )
    verb.add_argument("--gpu", default="h100-80", metavar="NAME", help="of the plan (h100-80)")
    for name in SETTINGS:
        verb.add_argument(f"--{name}", metavar="X", help=f"sbatch's --{name}")
    verb.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=X", help="another of its options"
    )
    verb.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="N jobs one after another, where a job may not requeue itself",
    )
    verb.add_argument("--site", default="", metavar="FILE", help="bash; default slurm/site.sh")
    verb.add_argument("--force", action="store_true", help="submit what does not fit by the plan")
    verb.add_argument("--dry-run", action="store_true", help="print the script alone")
    verb.set_defaults(handler=_submit)


def _slurm(options: argparse.Namespace) -> None:
    from dalle_dist.jobs.scripts import write_slurm

    print("\n".join(write_slurm(options.folder)))


def _progress(options: argparse.Namespace, parse: Parse) -> None:
    from dalle_dist.jobs.progress import in_vain, progress

    command = parse(options.command)
    print(in_vain(command) if options.in_vain else progress(command))


def _submit(options: argparse.Namespace) -> int:
    from dalle_dist.jobs.submit import Submission

    config, stage = load(options.preset, options.overrides), stage_of(options.stage)
    assert stage is not None
    submission = Submission(
        options.stage.replace("-", "_"),
        [options.preset, *options.overrides],
        getattr(config.paths, stage.run),
        _settings(options),
        options.chain,
        options.site,
    )
    if options.dry_run:
        print(submission.text(), end="")
        return 0
    if options.stage == "train" and options.gpus_per_node and not _fits(config, options):
        return 1
    (first, *others), name = submission.submit(), submission.folder
    after = f", then {', '.join(others)}" if others else ""
    print(f"submitted job {first}{after}; its script is in {name}/slurm/")
    print(f"dalle-dist status {name} shows how it goes")
    return 0


def _settings(options: argparse.Namespace) -> dict[str, str]:
    """sbatch's. Raises ConfigError: a number that cannot be, or an option without a value."""
    for name in ("nodes", "chain"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: at least 1")
    gpus = options.gpus_per_node
    tasks = options.tasks_per_node or max(gpus, 1)
    settings = {"nodes": str(options.nodes), "ntasks-per-node": str(tasks)}
    settings["gpus-per-node"] = str(gpus)
    for name in SETTINGS:
        value = getattr(options, name.replace("-", "_"))
        if value is not None:
            settings[name] = value
    for text in options.sbatch:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[a-z-]+", name):
            raise ConfigError(f"--sbatch {text}: NAME=X, e.g. reservation=maintenance")
        settings[name] = value
    return settings


def _fits(config: Config, options: argparse.Namespace) -> bool:
    """Print the plan, and what does not fit; whether to go on."""
    from dalle_dist.plan.hardware import hardware
    from dalle_dist.plan.items import Layout
    from dalle_dist.plan.plan import plan
    from dalle_dist.plan.text import line

    made = plan(config, Layout(options.nodes, options.gpus_per_node), hardware(options.gpu))
    days = made.timing.seconds * config.train.steps / 86_400
    length = f"{days:.3g} days for {config.train.steps:,} steps{_jobs(options, days)}"
    print(f"plan: {line(made)}, {length}")
    for misfit in made.misfits:
        print(f"does not fit: {misfit}", file=sys.stderr)
    if made.misfits and not options.force:
        print("not submitted; --gpu names another GPU, --force submits it anyway", file=sys.stderr)
    return options.force or not made.misfits


def _jobs(options: argparse.Namespace, days: float) -> str:
    limit = _days(options.time or "")
    return f": {math.ceil(days / limit)} times {options.time}" if limit else ""


def _days(limit: str) -> float:
    """Of Slurm's [days-]hours:minutes:seconds; 0 for what has another form."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?", limit)
    if not found:
        return 0.0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days + hours / 24 + minutes / 1440 + seconds / 86_400
