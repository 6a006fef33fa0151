"""Bytes that DeepSpeed reads and writes around its collectives: buckets, casts, sums, copies.

Counted by torch's dispatcher in DeepSpeed 0.19.8, per value of a gradient or of a weight. Passes
over the share that a rank owns are divided by the ranks that share the weights.
"""

from __future__ import annotations

from dalle_dist.engine.deepspeed.scatter import LARGE
from dalle_dist.plan.items import Item, nonzero
from dalle_dist.plan.model import Model
from dalle_dist.plan.settings import Settings
from dalle_dist.plan.traffic import gathered_per_micro_batch

_SUM = 12  # two fp32 values read, one written


def copies(model: Model, settings: Settings) -> tuple[Item, ...]:
    """Bytes of a rank in an optimizer step."""
    often, once = _gradients(model, settings)
    micro_batches = settings.accumulation
    how = f"{micro_batches} micro-batches x {often:,.3g} B + {once:,.3g} B"
    gathers = micro_batches * _gathers(model, settings)
    return nonzero(
        Item("of gradients", micro_batches * often + once, how),
        Item("of gathered parameters", gathers, f"{gathers:,.3g} B"),
    )


def _gradients(model: Model, settings: Settings) -> tuple[float, float]:
    """Of each micro-batch, and of the step beside them."""
    stage, values, width = settings.stage, model.parameters, settings.weight_bytes
    summed = 3 * width * values * (1 - 1 / settings.accumulation)  # by autograd, in place
    if stage == 3:
        return _scattered(model, settings), 0.0
    if stage == 2:
        return _bucketed(model, settings) + _owned(model, settings), 0.0
    if stage == 1 and settings.precision == "bf16":
        # `bf16_optimizer.py` keeps an fp32 sum beside, empties it, and reduces it as bf16.
        return summed + (2 + 4 + _SUM) * values, (4 + 8 + 6 + 4 + 6 + 8) * values
    if stage == 1:
        return summed, _bucketed(model, settings) + 8 * values / settings.shards
    # Flat, divided where there are several ranks, and back (`engine.py`).
    return summed, (4 if settings.sharing.shard_world == 1 else 6) * width * values


def _bucketed(model: Model, settings: Settings) -> float:
    """`stage_1_and_2.py`: into the bucket, divided, flat once more, back to the owner."""
    ranks, width, values = settings.shards, settings.weight_bytes, model.parameters
    # Gradients of one owner lie side by side; each of two groups has a border between two owners.
    shared = min(values, 2 * (ranks - 1) * settings.reduce_bucket)
    flat = values if settings.precision == "bf16" else shared
    found = width * ((2 + 2 + 2 / ranks) * values + 2 * flat)
    if settings.precision == "fp16":
        found += 2 * (4 + 2) * model.matrices  # to the dtype on the wire and from it
    return found


def _owned(model: Model, settings: Settings) -> float:
    """What is left on the owner of a reduced gradient is added to that of earlier micro-batches."""
    own, later = model.parameters / settings.shards, 1 - 1 / settings.accumulation
    if settings.precision == "bf16":
        return (2 + 4 + _SUM) * own
    return (8 + later * _SUM) * own


def _scattered(model: Model, settings: Settings) -> float:
    """`stage3.py`, `scatter.py`: small ones in the order of the ranks, divided; as `_owned`."""
    payload = _on_the_wire(model.matrices, model.others, settings)
    own, later = model.parameters / settings.shards, 1 - 1 / settings.accumulation
    narrow = model.matrices if settings.precision == "fp16" else model.parameters
    cast = (2 + 4) * narrow / settings.shards if settings.precision != "fp32" else 0.0
    if settings.precision != "fp16":
        # DeepSpeed's linear layer gives gradients of [I, O] matrices, a third of all, as [O, I].
        cast += 2 * settings.weight_bytes * model.matrices / 3
    copied = 4 * together(model, settings) + 2 / settings.shards * payload
    return copied + cast + (8 * (1 - later) + _SUM * later) * own


def alone(model: Model, settings: Settings) -> list[str]:
    """Parameters whose gradients ZeRO-3 reduces one by one where they lie."""
    if settings.stage < 3:
        return []
    return [n for n, s in model.sizes.items() if s >= LARGE and s % settings.shards == 0]


def together(model: Model, settings: Settings) -> float:
    """Bytes of the gradients that ZeRO-3 copies to be reduced."""
    large = set(alone(model, settings))
    small = {name: size for name, size in model.sizes.items() if name not in large}
    matrices = sum(size for name, size in small.items() if name in model.resblocks.matrices)
    return _on_the_wire(matrices, sum(small.values()) - matrices, settings)


def _gathers(model: Model, settings: Settings) -> float:
    """The shards made one, in their dtype on the wire; what has arrived, parameter by parameter.

    fp16 matrices that come alone need not be put together (`half_gather.py`).
    """
    if settings.stage < 3 or settings.shards == 1:
        return 0.0
    matrices, others = gathered_per_micro_batch(model, settings)
    payload = _on_the_wire(matrices, others, settings)
    arrived = payload
    cast = 0.0
    if settings.precision == "fp16":
        cast = (4 + 2) * matrices / settings.shards
        arrived -= 2 * matrices * _come_alone(model, settings)
    return 2 * arrived + 2 / settings.shards * payload + cast


def gather_groups(model: Model, settings: Settings) -> list[list[str]]:
    """Parameters that ZeRO-3 gathers at once: as many as make the prefetch size full."""
    groups, size = [list[str]()], 0
    for name, numel in model.sizes.items():
        if numel <= settings.persistent_up_to:
            continue  # whole on every rank
        if size > settings.prefetch:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += numel
    return groups


def _come_alone(model: Model, settings: Settings) -> float:
    """Share of the matrices' values in gathers of one; other dtypes are gathered apart."""
    in_groups = (
        [n for n in g if n in model.resblocks.matrices] for g in gather_groups(model, settings)
    )
    singles = [names[0] for names in in_groups if len(names) == 1]
    return sum(model.sizes[name] for name in singles) / model.matrices


def _on_the_wire(matrices: float, others: float, settings: Settings) -> float:
    return settings.matrix_wire_bytes * matrices + settings.other_wire_bytes * others
