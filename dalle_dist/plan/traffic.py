"""Bytes that a rank sends in one optimizer step, inside its node and between nodes.

A ring of N ranks sends n (N - 1) / N bytes from each to gather n bytes or to reduce-scatter them,
and twice that to all-reduce them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle_dist.config import Config
from dalle_dist.gradients.all_reduce import bytes_per_value
from dalle_dist.plan.items import Item, Layout, nonzero
from dalle_dist.plan.model import Model
from dalle_dist.plan.settings import Settings
from dalle_dist.plan.shares import Share

NUMBERS = 8  # losses, counts and the like that travel with the flags of the resblocks


@dataclass(frozen=True)
class Traffic:
    """Bytes of the rank that sends most, per optimizer step.

    inside   between GPUs of a node
    between  through the node's network
    """

    inside: tuple[Item, ...]
    between: tuple[Item, ...]


def ring(payload: float, ranks: int, passes: int = 1) -> float:
    """Bytes that each rank sends."""
    return passes * payload * (ranks - 1) / ranks


def traffic(
    config: Config, model: Model, settings: Settings, share: Share, layout: Layout
) -> Traffic:
    weights = (*_parameters(model, settings), *_reduced(model, settings))
    scalars = Item(
        "flags and numbers",
        ring(8 * (model.resblocks.count + 1 + NUMBERS), layout.world, 2),
        f"all-reduce of {model.resblocks.count + 1 + NUMBERS} fp64 over all ranks",
    )
    node = layout.gpus_per_node
    if settings.sharing.shard_world <= node:
        between = (*_averaged(config, settings, share), *_cut((scalars,), 1 / node, layout))
        return Traffic((*weights, *_cut((scalars,), 1 - 1 / node, layout)), nonzero(*between))
    # A ring over all GPUs leaves the node at one GPU of each.
    everything = (*weights, scalars)
    return Traffic(_cut(everything, (node - 1) / node, layout), _cut(everything, 1 / node, layout))


def _cut(items: tuple[Item, ...], part: float, layout: Layout) -> tuple[Item, ...]:
    if layout.nodes == 1:
        part = 1.0 if part == 1 - 1 / layout.gpus_per_node or layout.gpus_per_node == 1 else 0.0
    return nonzero(*(Item(i.name, i.amount * part, i.how) for i in items))


def gathered_per_micro_batch(model: Model, settings: Settings) -> tuple[float, float]:
    """Values of matrices and of others that ZeRO-3 gathers for a micro-batch's passes.

    Forward and backward pass gather once each, but for what is kept from the one to the other:
    parameters between whose uses DeepSpeed counts fewer than `stage3_max_reuse_distance` values.
    """
    large = {n: s for n, s in model.sizes.items() if s > settings.persistent_up_to}
    # On its way back a checkpointed layer is passed twice.
    uses = 3 if settings.train.checkpoint_activations else 2
    kept, behind = 0.0, 0
    both = [0.0, 0.0]
    for name, size in reversed(list(large.items())):
        twice = uses * behind + size >= settings.max_reuse or kept + size > settings.max_live
        kept += 0 if twice else size
        both[name not in model.resblocks.matrices] += size * (2 if twice else 1)
        behind += size
    return both[0], both[1]


def _parameters(model: Model, settings: Settings) -> tuple[Item, ...]:
    ranks, low = settings.shards, settings.weight_bytes
    if settings.stage == 0:
        return ()
    if settings.stage < 3:
        how = f"{model.parameters:,} x {low} B after the step"
        return (Item("gathers of parameters", ring(low * model.parameters, ranks), how),)
    matrices, others = gathered_per_micro_batch(model, settings)
    small = sum(s for s in model.sizes.values() if s <= settings.persistent_up_to)
    wide, narrow = settings.other_wire_bytes, settings.matrix_wire_bytes
    once = low * small
    payload = settings.accumulation * (narrow * matrices + wide * others) + once
    how = (
        f"{settings.accumulation} micro-batches x ({matrices:,.0f} x {narrow} B + "
        f"{others:,.0f} x {wide} B), {small:,} x {low} B after the step"
    )
    return (Item("gathers of parameters", ring(payload, ranks), how),)


def _reduced(model: Model, settings: Settings) -> tuple[Item, ...]:
    ranks, stage = settings.shards, settings.stage
    narrow, wide = settings.matrix_wire_bytes, settings.other_wire_bytes
    if stage == 0:
        narrow = wide = settings.weight_bytes
        ranks = settings.sharing.shard_world
    payload = narrow * model.matrices + wide * model.others
    times = settings.accumulation if stage >= 2 else 1
    values = f"{model.matrices:,} x {narrow} B + {model.others:,} x {wide} B"
    name, passes = ("reduce-scatters", 1) if stage == 3 else ("all-reduces of gradients", 2)
    items = [Item(name, ring(times * payload, ranks, passes), f"{times} x ({values})")]
    if stage == 1 and settings.precision == "bf16" and settings.between != "zero":
        how = f"{model.parameters:,} x 4 B, made whole again inside the node"
        items.append(Item("whole gradients", ring(4 * model.parameters, ranks, 2), how))
    return tuple(items)


def _averaged(config: Config, settings: Settings, share: Share) -> tuple[Item, ...]:
    nodes, width = settings.sharing.replicas, bytes_per_value(config.parallel.comm_dtype)
    if settings.between == "diloco":
        size, every = bytes_per_value(config.parallel.outer_dtype), config.parallel.outer_every
        how = f"all-reduce of {share.whole:,} x {size} B, every {every} steps"
        return (Item("outer steps", ring(size * share.whole, nodes, 2) / every, how),)
    names = (("P", share.p, width), ("Q", share.q, width), ("sent whole", share.whole, 4))
    return tuple(
        Item(name, ring(size * values, nodes, 2), f"all-reduce of {values:,} x {size} B")
        for name, values, size in names
    )
