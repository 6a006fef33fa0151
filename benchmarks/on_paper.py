"""The 12B run's start and steps on 1,024 ranks, counted in one process that stands for all.

The process group is torch's fake one (`alike_ranks.py`); weights, DeepSpeed, gradients and
optimizer are real, at the preset's width and with one layer, then with two: what a layer adds is
the difference, and 64 layers are 64 of them. Tokens are few: they change no weight's bytes. The
plan says the same of the whole, and the paper what PowerSGD leaves out.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import common
from benchmarks.alike_ranks import AlikeRanks, HostWaits, Said
from benchmarks.common import Measured
from dalle_dist.config import Config, load
from dalle_dist.data.notes import Notes
from dalle_dist.data.token_dataset import TokenSample
from dalle_dist.plan.hardware import hardware
from dalle_dist.plan.items import Layout, total
from dalle_dist.plan.plan import Plan, plan
from dalle_dist.plan.timing import collectives
from dalle_dist.train.optimizer_step import OptimizerSteps
from dalle_dist.train.transformer import TransformerStage
from dalle_dist.watch.own_time import OwnTime

NODES, LOCAL = 128, 8
NORMS = 2  # all-reduces of the gradient's norm: of matrices, and of all others
STEPS = 3  # DeepSpeed's first two compare the order of modules between ranks
# Of tensors that lie on the host on GPUs too: captions, AdamW's count of its steps; and a mask that
# is asked for on CPUs alone.
ON_HOST = (
    "transformer/layout.py:counted_indices",
    "optim/adamw.py:_update",
    "gradients/batches.py:take",
    "powersgd/error_feedback.py:accumulate",
    "minifloat/error_feedback.py:add_decoded",
)


@dataclass(frozen=True)
class Counted:
    """Of one number of layers.

    made    process groups that this rank took part in making
    start   collectives before the first step
    step    those of a later step
    waits   where in it the host waits for the device, and how often
    """

    made: int
    start: list[Said]
    step: list[Said]
    waits: Counter[str]


def main() -> None:
    options = common.arguments(__doc__, rounds=1)
    name = "12b"
    overrides = ["name=smoke", *SMALLER] if options.smoke else []
    rows = figures(name, overrides, (1, 2))
    common.report("on_paper", load(name, overrides), rows, options)


SMALLER = ["transformer.width=512", "transformer.heads=8", "parallel.rank=64"]
FEW_TOKENS = ["transformer.text_tokens=16", "transformer.image_grid=4", "dvae.image_size=32"]


def figures(name: str, overrides: Sequence[str], layers: tuple[int, int]) -> list[Measured]:
    """Counts of the preset at all its layers, extrapolated from two numbers of them."""
    small = [*overrides, *FEW_TOKENS, f"parallel.local_world_size={LOCAL}"]
    configs = [load(name, [*small, f"transformer.layers={n}"]) for n in layers]
    # A process each: DeepSpeed keeps what it has found at its first start.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        fewer, more = pool.map(count, configs, chunksize=1)
    config = load(name, [*overrides, f"parallel.local_world_size={LOCAL}"])
    made = plan(config, Layout(NODES, LOCAL), hardware("h100-80"))
    whole = functools.partial(_at, layers, config.transformer.layers)
    case = f"{config.transformer.layers} layers"
    scalars = [said for said in more.step if said.members == NODES * LOCAL]
    rows = [
        Measured("start", "process groups made by a rank", "", [more.made]),
        Measured("start", "collectives of all ranks", "", [_count(more.start, NODES * LOCAL)]),
        Measured("step", "all-reduces of all ranks", "", [len(scalars)]),
        Measured("step", "waits of the host, ours", "", [_waits(more, ours=True)]),
        Measured("step", "waits of the host, DeepSpeed's", "", [_waits(more, ours=False)]),
        Measured("step", "all-reduces of the norm in a node", "", [_norms(more)]),
    ]
    for where, members, planned in (
        ("inside a node", (LOCAL,), total(made.traffic.inside)),
        ("between nodes", (NODES,), _averaged(made)),
    ):
        sent = whole(*(_sent(counted.step, members) for counted in (fewer, more)))
        rows.append(Measured(case, f"a rank sends {where}", "GB", [sent / 1e9]))
        rows.append(Measured(case, f"sent {where} / planned", "x", [sent / planned]))
        calls = whole(*(_count(counted.step, *members) for counted in (fewer, more)))
        if members == (NODES,):  # of waves, whose number two layers have reached
            calls = _count(more.step, *members)
        rows.append(Measured(case, f"collectives {where}", "", [calls]))
        if members == (LOCAL,):
            planned_calls = collectives(made.model, made.settings) + NORMS
            rows.append(
                Measured(case, f"collectives {where} / planned", "x", [calls / planned_calls])
            )
    rows.append(Measured(case, "PowerSGD leaves out", "%", [100 * _left_out(config, fewer, more)]))
    return rows


def _left_out(config: Config, fewer: Counted, more: Counted) -> float:
    """Of the values of a layer's matrices; P and Q are all that goes between nodes in 16 bits."""
    factors = [
        sum(one.bytes // 2 for one in counted.step if one.dtype == "bfloat16")
        for counted in (fewer, more)
    ]
    return 1 - (factors[1] - factors[0]) / (12 * config.transformer.width**2 / LOCAL)


def count(config: Config) -> Counted:
    """Build the engine on rank 0 of 1,024 and make `STEPS` steps; the last one is counted."""
    with AlikeRanks(0, NODES, LOCAL) as alike:
        stage = TransformerStage.__new__(TransformerStage)  # its data is not needed
        stage.config, stage.settings = config, config.train
        engine = stage.build_engine(alike.ranks)
        steps = OptimizerSteps(
            stage, engine, alike.ranks, _batches(config), Notes(), Notes(), lambda: (False, False),
            OwnTime(torch.device("cpu"), alone=False),
        )  # fmt: skip
        start, waits = list(alike.said), HostWaits()
        for step in range(1, STEPS + 1):
            mark, waits = len(alike.said), HostWaits()
            with waits:
                made = steps.make(step, 1e-4, measure=False, last=step == STEPS)
            if made.skipped:
                raise SystemExit(f"step {step} was skipped: its collectives are not a step's")
        return Counted(alike.made, start, alike.said[mark:], waits.found)


def _batches(config: Config) -> Iterator[TokenSample]:
    shape, generator = config.transformer, torch.Generator().manual_seed(0)
    size = config.train.micro_batch
    while True:
        text = torch.randint(2, 1000, (size, shape.text_tokens), generator=generator)
        codes = torch.randint(shape.codebook_size, (size, shape.image_tokens), generator=generator)
        yield TokenSample(text, codes, codes)


def _at(layers: tuple[int, int], wanted: int, fewer: float, more: float) -> float:
    return fewer + (more - fewer) / (layers[1] - layers[0]) * (wanted - layers[0])


def _count(said: Sequence[Said], *members: int) -> int:
    return sum(one.members in members for one in said)


def _sent(said: Sequence[Said], members: Sequence[int]) -> float:
    """Bytes that this rank sends, by rings."""
    passes = {"all_reduce": 2}
    found = (one for one in said if one.members in members)
    return sum(
        passes.get(one.kind, 1) * one.bytes * (one.members - 1) / one.members for one in found
    )


def _averaged(made: Plan) -> float:
    return total(i for i in made.traffic.between if i.name in ("P", "Q", "sent whole"))


def _norms(counted: Counted) -> int:
    return sum(one.members == LOCAL and one.kind == "all_reduce" for one in counted.step)


def _waits(counted: Counted, ours: bool) -> int:
    places = {p: n for p, n in counted.waits.items() if not p.endswith(ON_HOST)}
    return sum(n for place, n in places.items() if ("dalle_dist/" in place) == ours)


if __name__ == "__main__":
    main()
