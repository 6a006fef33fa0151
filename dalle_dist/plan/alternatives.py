"""Other settings of the same run: what they would need, the quickest that fits marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dalle_dist.config import Config
from dalle_dist.errors import ConfigError
from dalle_dist.plan.plan import Plan, plan

SHOWN = 8
MICRO_BATCHES = (1, 2, 4, 8, 16)
RANKS = (0.5, 0.75)  # of parallel.rank; they change what is learned, so none of them is the best


@dataclass(frozen=True)
class Alternative:
    """A plan with other settings; `learns` is whether its steps are those of the config."""

    plan: Plan
    learns: bool = True

    @property
    def name(self) -> str:
        settings, config = self.plan.settings, self.plan.config
        again = "checkpoints" if config.train.checkpoint_activations else "all kept"
        rank = f", rank {config.parallel.rank}" if self.plan.share.rank else ""
        return (
            f"{settings.precision}, ZeRO-{settings.stage}, micro-batch {settings.samples}, "
            f"{again}{rank}"
        )


def alternatives(made: Plan) -> list[Alternative]:
    """Those that the config allows, quickest first, those that do not fit last."""
    found = [Alternative(other) for other in _plans(made, _trains(made))]
    found += [Alternative(other, learns=False) for other in _plans(made, _ranks(made))]
    return sorted(found, key=lambda a: (bool(a.plan.misfits), a.plan.timing.seconds))


def best(found: list[Alternative]) -> Alternative | None:
    """The quickest that fits and learns the same; None: none fits."""
    return next((a for a in found if a.learns and not a.plan.misfits), None)


def table(made: Plan) -> Iterator[str]:
    """Lines: the quickest few, the plan itself, and marks."""
    found = alternatives(made)
    chosen = best(found)
    learning = [entry for entry in found if entry.learns]
    for number, entry in enumerate(learning):
        own = entry.name == Alternative(made).name
        if number < SHOWN or own:
            yield _row(entry, entry is chosen, own)
    yield from (_row(entry, False, False) for entry in found if not entry.learns)


def _row(entry: Alternative, is_best: bool, is_own: bool) -> str:
    made = entry.plan
    marks = [text for text, holds in (
        ("best", is_best), ("this config", is_own), ("does not fit", bool(made.misfits)),
        ("learns otherwise", not entry.learns),
    ) if holds]  # fmt: skip
    return (
        f"{entry.name:58}{made.gpu_bytes / 1e9:8,.1f} GB{1e3 * made.timing.seconds:11,.1f} ms"
        f"{made.timing.mfu:8.1%}  {', '.join(marks)}"
    )


def _plans(made: Plan, configs: Iterator[Config]) -> Iterator[Plan]:
    for config in configs:
        try:
            yield plan(config, made.layout, made.hardware, model=made.model)
        except ConfigError:
            continue


def _trains(made: Plan) -> Iterator[Config]:
    precisions = ("bf16", "fp16") if made.hardware.bf16 else ("fp16", "fp32")
    own = made.settings
    choices = itertools.product(
        sorted({own.precision, *precisions}),
        (1, 2, 3),
        sorted({own.samples, *MICRO_BATCHES}),
        (True, False),
    )
    for precision, stage, samples, again in choices:
        train = replace(
            made.config.train,
            precision=precision,  # type: ignore[arg-type]
            zero_stage=stage,  # type: ignore[arg-type]
            micro_batch=samples,
            checkpoint_activations=again,
        )
        try:
            yield replace(made.config, train=train)
        except ConfigError:
            continue


def _ranks(made: Plan) -> Iterator[Config]:
    if made.share.rank:
        for part in RANKS:
            rank = int(made.config.parallel.rank * part)
            yield replace(made.config, parallel=replace(made.config.parallel, rank=rank))
