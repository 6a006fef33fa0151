"""`dalle-dist VERB ...`; a verb imports what it needs when called, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NoReturn

from dalle_dist import __version__
from dalle_dist.config import Config, load, preset_names, to_yaml
from dalle_dist.conversion.verbs import add_convert
from dalle_dist.data.verbs import add_data
from dalle_dist.distributed.launchers import read_environment
from dalle_dist.doctor.verbs import add_doctor
from dalle_dist.errors import HUNG, ConfigError, OtherRankError, UserError
from dalle_dist.evaluate.verbs import add_evaluate
from dalle_dist.generate.verbs import add_complete, add_generate, add_samples
from dalle_dist.jobs.verbs import add_jobs
from dalle_dist.overlap.verbs import add_overlap
from dalle_dist.plan.verbs import add_plan
from dalle_dist.serve.verbs import add_serve
from dalle_dist.stages import STAGES
from dalle_dist.watch.verbs import add_status

if TYPE_CHECKING:
    from dalle_dist.distributed.ending import Ending

Handler = Callable[[argparse.Namespace], int | None]
PROCESS_GROUP = "dalle_dist.distributed.process_group"
ENDING = "dalle_dist.distributed.ending"
LOST = (
    "another rank is gone without a word: killed, mostly for want of memory, or its machine or the "
    "network is lost; the run goes on from its last checkpoint with --resume auto"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit status is 0 or the verb's own, 2 after one line that says the fix."""
    options = parsed(arguments)
    try:
        status: int = options.handler(options) or 0
    except OtherRankError:
        return 2
    except UserError as error:
        if _first_to_tell(2, error):
            print(f"dalle-dist: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # What another rank has already told of breaks this one's collectives.
        told = _told_elsewhere()
        if told:
            return told
        ending = sys.modules.get(ENDING)
        if ending is None or not ending.lost_peer(error):
            _first_to_tell(2)
            raise
        if _first_to_tell(HUNG):
            print(f"dalle-dist: error: {LOST}", file=sys.stderr, flush=True)
        return HUNG
    process_group = sys.modules.get(PROCESS_GROUP)
    if process_group is not None:
        process_group.shutdown()
    return status


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """A command line; what is wrong with it ends the process with 2."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse cannot take "--flag" between two positional lists: key=value words end up in `rest`.
    misplaced = [word for word in rest if word.startswith("-") or "=" not in word]
    if misplaced or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(misplaced or rest)}")
    if rest:
        options.overrides += rest
    return options


def program() -> NoReturn:
    """`dalle-dist`, as a process: `main`, and an end that all ranks of a run take together."""
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    process_group = sys.modules.get(PROCESS_GROUP)
    if process_group is not None:
        process_group.leave(status)
    sys.exit(status)


def _ending() -> Ending | None:
    """None before this process has joined others; torch is not imported for the question."""
    process_group = sys.modules.get(PROCESS_GROUP)
    return None if process_group is None else process_group.ending()


def _first_to_tell(status: int, error: UserError | None = None) -> bool:
    """Whether this rank prints the error: of those that have met, the first that has one."""
    ending = _ending()
    if ending is not None:
        return ending.announce(status)
    # Not joined: a config that is wrong is wrong on all ranks, and each has read it.
    return not isinstance(error, ConfigError) or _rank() == 0


def _rank() -> int:
    try:
        return read_environment(os.environ).rank
    except ConfigError:
        return 0


def _told_elsewhere() -> int:
    ending = _ending()
    return 0 if ending is None else ending.told_elsewhere()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalle-dist", description="Train DALL-E, from a laptop's CPU to a cluster."
    )
    parser.add_argument("--version", action="version", version=_versions())
    # The `deepspeed` launcher puts this before the verb; ranks are read from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_data(verbs)
    _add_tokenizer(verbs)
    for stage in STAGES.values():
        verb = _add_configured(verbs, stage.verb, _train, stage.help)
        verb.add_argument("--resume", metavar="auto|PATH", help="go on from a checkpoint")
        verb.add_argument(
            "--new-epoch",
            action="store_true",
            help="with --resume: where training set, seed, data.streams, data.shuffle_shards or "
            "batch size are others, begin the next epoch with them",
        )
        verb.set_defaults(train=stage.train)
    _add_encode(verbs)
    add_plan(verbs)
    add_status(verbs)
    add_doctor(verbs)
    _add_configured(verbs, "report", _report, "curves, reconstructions, samples: report.html")
    _add_config(verbs)
    add_generate(verbs)
    add_complete(verbs)
    add_samples(verbs)
    add_serve(verbs)
    add_evaluate(verbs)
    add_overlap(verbs)
    add_convert(verbs)
    _add_plot(verbs)
    add_jobs(verbs, parsed)
    return parser


def _versions() -> str:
    """Ours and those of what a run's figures hang on, without importing it."""
    found = []
    for name in ("torch", "deepspeed"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"dalle-dist {__version__} ({', '.join(found)})"


def _add_configured(
    verbs: argparse._SubParsersAction,
    name: str,
    handler: Handler,
    text: str,
    presets: str | None = None,
) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    names = ", ".join(preset_names())
    verb.add_argument("preset", nargs=presets, metavar="PRESET", help=f"{names}, or a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100")
    verb.set_defaults(handler=handler)
    return verb


def _add_config(verbs: argparse._SubParsersAction) -> None:
    text = "print the whole config that a command would use, or what a key means"
    verb = _add_configured(verbs, "config", _config, text, presets="?")
    verb.add_argument("--explain", metavar="KEY", help="a key or section, e.g. train.lr; no PRESET")


def _add_encode(verbs: argparse._SubParsersAction) -> None:
    verb = _add_configured(verbs, "encode", _encode, "image shards to token shards, once")
    verb.add_argument(
        "--shard", metavar="I/N", help="make only the I-th of N parts of the shards, 1/N to N/N"
    )
    verb.add_argument(
        "--crops",
        type=int,
        default=1,
        metavar="K",
        help="of each image: centre, random ones",
    )
    verb.add_argument("--flip", action="store_true", help="mirror every other random crop")


def _add_tokenizer(verbs: argparse._SubParsersAction) -> None:
    actions = verbs.add_parser("tokenizer", help="train the text tokenizer").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    train = _add_configured(actions, "train", _tokenizer_train, "BPE on the training captions")
    train.add_argument(
        "--captions",
        type=_count,
        default=10_000_000,
        metavar="N",
        help="a sample of so many, spread over the shards, where there are more (default 10e6)",
    )


def _count(text: str) -> int:
    """Also 10e6. Raises ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not (number >= 1 and number.is_integer()):
        raise argparse.ArgumentTypeError(f"{text}: a whole number, at least 1, e.g. 200000 or 10e6")
    return int(number)


def _add_plot(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("plot", help="what a run logged for each resblock, as an image")
    verb.add_argument(
        "what", choices=("scales", "compression"), help="gradient scales (fp16), or PowerSGD's loss"
    )
    verb.add_argument("run", metavar="RUN")
    verb.set_defaults(handler=_plot)


def _tokenizer_train(options: argparse.Namespace) -> None:
    from dalle_dist import storage
    from dalle_dist.data.caption_sample import CaptionSample
    from dalle_dist.data.shards import ShardSet
    from dalle_dist.text_tokenizer.bpe import train_tokenizer

    config = _config_of(options)
    if config.tokenizer.kind != "bpe":
        raise ConfigError(f"tokenizer.kind: '{config.tokenizer.kind}' is not trained here; bpe is")
    shards = ShardSet(storage.join(config.paths.images, "train"), "images")
    captions = CaptionSample(shards, options.captions, config.seed)
    tokenizer = train_tokenizer(captions, config.tokenizer.vocab_size)
    tokenizer.save(config.paths.tokenizer)
    bytes_ = len(storage.read_bytes(config.paths.tokenizer))
    print(f"trained on {captions}")
    print(f"{config.paths.tokenizer}: {tokenizer.vocab_size} classes, {bytes_} bytes")


def _encode(options: argparse.Namespace) -> None:
    config = _config_of(options)
    from dalle_dist.data.shard_job import share
    from dalle_dist.train.encode import encode

    if options.crops < 1:
        raise ConfigError(f"--crops {options.crops}: at least 1, the centre")
    encode(config, share(options.shard), options.crops, options.flip)


def _train(options: argparse.Namespace) -> None:
    config = _shared_config_of(options)
    resolve_name(options.train)(config, options.resume, options.new_epoch)


def _report(options: argparse.Namespace) -> None:
    config = _config_of(options)
    from dalle_dist.report.report import write_report

    write_report(config)


def _config(options: argparse.Namespace) -> None:
    if (options.explain is None) == (options.preset is None):
        raise ConfigError("config: give a PRESET, or --explain KEY")
    if options.explain is None:
        print(to_yaml(_config_of(options)), end="")
        return
    from dalle_dist.config.docs import explain

    print(explain(options.explain))


def _plot(options: argparse.Namespace) -> None:
    from dalle_dist.report.plots import plot

    print(plot(options.what, options.run))


def _config_of(options: argparse.Namespace) -> Config:
    return load(options.preset, options.overrides)


def _shared_config_of(options: argparse.Namespace) -> Config:
    """The config for a program that all ranks run: what one cannot read, none goes on with."""
    if read_environment(os.environ).world == 1:
        return _config_of(options)
    from dalle_dist.distributed import process_group

    return process_group.init().together(lambda: _config_of(options))


if __name__ == "__main__":
    program()
