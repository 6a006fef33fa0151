"""A plan as text: what stands on each line, its size, and how it was counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dalle_dist.plan.alternatives import table
from dalle_dist.plan.items import Item, total
from dalle_dist.plan.plan import Plan

NAME, AMOUNT = 38, 12


def lines(plan: Plan) -> Iterator[str]:
    yield from _head(plan)
    yield from _gpu(plan)
    yield from _list("Host memory of a node", plan.host, "GB", 1e9)
    yield from _list("Disk or store", plan.disk, "GB", 1e9, summed=False)
    yield from _list("Sent by a GPU inside its node, per step", plan.traffic.inside, "GB", 1e9)
    yield from _list("Sent by a GPU to other nodes, per step", plan.traffic.between, "GB", 1e9)
    if plan.share.compressed:
        rank, saved = plan.share.rank, plan.share.saved
        yield f"  PowerSGD of rank {rank} leaves out {saved:.1%} of the matrices"
    yield from _time(plan)
    yield ""
    yield "Alternatives: settings, most GPU memory, step, model-FLOP utilisation"
    yield from (f"  {row}" for row in table(plan))
    yield ""
    yield from _verdict(plan)


def line(plan: Plan) -> str:
    """One line: memory of a GPU, time of a step, tokens, utilisation."""
    timing = plan.timing
    return (
        f"{plan.gpu_bytes / 1e9:,.1f} of {plan.hardware.memory / 1e9:,.0f} GB per GPU, "
        f"{timing.seconds:.3g} s per step, {timing.tokens_per_s:,.0f} tokens/s, model-FLOP "
        f"utilisation {timing.mfu:.1%}"
    )


def beside(plan: Plan, measured: Mapping[str, float]) -> list[str]:
    """Plan, what was measured, and measured / plan, a line for each of these that is there.

    Args:
        measured: numbers of the log by their names: seconds_per_step, tokens_per_s, mfu,
            peak_memory_bytes. The log's mfu is a share of what the machine's products reach,
            so the plan's is here too.
    """
    timing = plan.timing
    planned = {
        "seconds_per_step": timing.seconds,
        "tokens_per_s": timing.tokens_per_s,
        "mfu": timing.mfu / timing.gemm_share,
        "peak_memory_bytes": plan.memory.total,
    }
    rows = [f"{'':20}{'plan':>14}{'measured':>14}{'ratio':>8}"]
    for name, value in planned.items():
        if name in measured:
            found = measured[name]
            rows.append(f"{name:20}{value:14,.4g}{found:14,.4g}{found / value:8.2f}")
    return rows


def _head(plan: Plan) -> Iterator[str]:
    settings, layout = plan.settings, plan.layout
    yield (
        f"{plan.config.name}: {plan.model.parameters:,} parameters, {plan.model.matrices:,} in "
        f"matrices; {settings.precision}, ZeRO-{settings.stage}, between nodes {settings.between}"
    )
    yield (
        f"on {layout.nodes} nodes x {layout.gpus_per_node} {plan.hardware.name} "
        f"({plan.hardware.source}), {plan.hardware.wire / 1e9:,.0f} Gbit/s per node; "
        f"{settings.accumulation} x {settings.samples} samples on each"
    )


def _gpu(plan: Plan) -> Iterator[str]:
    memory, fullest = plan.memory, plan.memory.fullest
    context = Item("CUDA context, NCCL", plan.hardware.context, "assumed (hardware.yaml)")
    yield from _list("GPU memory, always", (*memory.held, context), "GB", 1e9)
    yield from _list(
        f"GPU memory, then ({memory.fullest})", memory.moments[memory.fullest], "GB", 1e9
    )
    yield "  other moments: " + ", ".join(
        f"{name} {total(items) / 1e9:,.2f}"
        for name, items in memory.moments.items()
        if name != fullest and items
    )
    most, there = plan.gpu_bytes / 1e9, plan.hardware.memory / 1e9
    yield f"  {'at most':{NAME}}{most:{AMOUNT},.3f} GB of {there:,.0f}"


def _list(
    title: str, items: Iterable[Item], unit: str, scale: float, summed: bool = True
) -> Iterator[str]:
    found = tuple(items)
    yield ""
    yield title
    for item in found:
        yield f"  {item.name:{NAME}}{item.amount / scale:{AMOUNT},.3f} {unit}  {item.how}"
    if summed:
        yield f"  {'sum':{NAME}}{total(found) / scale:{AMOUNT},.3f} {unit}"


def _time(plan: Plan) -> Iterator[str]:
    timing = plan.timing
    yield ""
    yield "Time of an optimizer step"
    for item in timing.items:
        share = item.amount / timing.seconds
        amount = f"{1e3 * item.amount:{AMOUNT},.2f} ms {share:6.1%}"
        yield f"  {item.name:{NAME}}{amount}  {item.how}"
    yield f"  {'sum':{NAME}}{1e3 * timing.seconds:{AMOUNT},.2f} ms"
    yield (
        f"  {timing.tokens_per_s:,.0f} tokens/s, model-FLOP utilisation {timing.mfu:.1%}, other "
        f"than products of matrices {timing.other_than_gemms:.1%}; {timing.steps:,} steps: "
        f"{timing.days:,.1f} days, {timing.gpu_hours:,.0f} GPU-hours"
    )


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.misfits:
        yield "Does not fit:"
        yield from (f"  {line}" for line in plan.misfits)
    else:
        yield "Fits."
