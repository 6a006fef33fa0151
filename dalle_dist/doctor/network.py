"""Bytes per second of the collectives of a run: inside hosts, between them, and host by host.

All-reduce runs over the groups that a run has: the ranks of a node, and those of equal place on all
nodes. To tell the slow host, one rank of each exchanges tensors with both of its neighbours in a
ring, even pairs first, then odd ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.distributed.groups import Groups, node_groups
from dalle_dist.doctor.meeting import HANGS
from dalle_dist.doctor.patient import Patient, values_of
from dalle_dist.doctor.reading import far_below
from dalle_dist.doctor.report import Row, Verdict

NAME = "network"
SIZES = (1 << 20, 16 << 20, 256 << 20)  # bytes of a tensor
SECONDS = 1.0  # of each of the three measurements, after which no larger size is begun
REPEATS = 3
WANTED = "above half of the median"


def network(patient: Patient) -> list[Row]:
    """Rows of the rates; nodes and pairs far below the median are named."""
    meeting = patient.meeting
    if meeting.lost:
        text = f"without {meeting.named(meeting.lost)} no collective would end"
        return [Row(NAME, Verdict.SKIP, text)]
    if patient.ranks.world == 1:
        return [Row(NAME, Verdict.SKIP, "one rank")]
    local = (patient.config.parallel.local_world_size or None) if patient.config else None
    made: list[Groups] = []
    answers = meeting.everywhere(lambda: made.append(_ready(patient, local)), HANGS)
    rows = patient.failures(NAME, answers)
    for measure in (_inside, _between, _pairs):
        if any(row.verdict is Verdict.FAIL for row in rows):  # what hangs would hang again
            return rows
        rows += measure(patient, made[0])
    return rows


def _ready(patient: Patient, local: int | None) -> Groups:
    """The groups of the run, and memory enough to measure them. Raises ConfigError."""
    _buffer(patient)
    return node_groups(patient.ranks, local)


def _inside(patient: Patient, groups: Groups) -> list[Row]:
    if groups.local_world_size == 1:
        return []
    answers = patient.meeting.everywhere(lambda: all_reduce_rate(patient, groups.shard), HANGS)
    rows, rates = patient.failures(NAME, answers), values_of(answers)
    return rows or [_row("inside nodes, all-reduce", patient, rates, far_below(rates))]


def _between(patient: Patient, groups: Groups) -> list[Row]:
    if groups.nodes == 1:
        return []
    answers = patient.meeting.everywhere(lambda: all_reduce_rate(patient, groups.replica), HANGS)
    rows, rates = patient.failures(NAME, answers), values_of(answers)
    text = f"between {groups.nodes} nodes, all-reduce of each rank"
    return rows or [_row(text, patient, rates, [])]


def _pairs(patient: Patient, groups: Groups) -> list[Row]:
    if groups.nodes == 1:
        return []
    firsts = patient.meeting.everywhere(lambda: groups.shard_rank == 0)
    ring = [answer.rank for answer in firsts if answer.value]
    answers = patient.meeting.everywhere(lambda: ring_rates(patient, ring), HANGS)
    rows = patient.failures(NAME, answers)
    ends: dict[tuple[int, int], list[float]] = {}
    for at, found in values_of(answers).items():
        for other, rate in found:
            ends.setdefault((min(at, other), max(at, other)), []).append(rate)
    rates = {pair: min(found) for pair, found in ends.items()}
    if rows:
        return rows
    if slow := slow_pairs(rates):
        return [*_slow_rows(patient, rates, slow)]
    a, b = min(rates, key=lambda pair: rates[pair])
    text = f"pairs of nodes: {_rates(min(rates.values()), median(rates.values()))}"
    return [Row(NAME, Verdict.OK, f"{text}, {patient.meeting.named([a, b])}", WANTED)]


def _slow_rows(
    patient: Patient, rates: dict[tuple[int, int], float], slow: list[tuple[int, int]]
) -> Iterator[Row]:
    nodes, middle = slow_nodes(rates, slow), median(rates.values())
    for node in nodes:
        rate = max(rates[pair] for pair in slow if node in pair)
        text = f"{patient.meeting.named([node])} with both neighbours: {_rates(rate, middle)}"
        yield Row(NAME, Verdict.WARN, text, WANTED)
    for pair in slow:
        if not set(pair) & set(nodes):
            text = f"between {patient.meeting.named(pair)}: {_rates(rates[pair], middle)}"
            yield Row(NAME, Verdict.WARN, text, WANTED)


def slow_pairs(rates: dict[tuple[int, int], float]) -> list[tuple[int, int]]:
    """Pairs far below the median pair."""
    numbered = dict(enumerate(rates))
    return [numbered[i] for i in far_below({i: rates[pair] for i, pair in numbered.items()})]


def slow_nodes(rates: dict[tuple[int, int], float], slow: list[tuple[int, int]]) -> list[int]:
    """Ranks of which all pairs, two at least, are slow."""
    ranks = dict.fromkeys(rank for pair in slow for rank in pair)
    pairs = {rank: [pair for pair in rates if rank in pair] for rank in ranks}
    return [r for r, own in pairs.items() if len(own) > 1 and all(pair in slow for pair in own)]


def all_reduce_rate(patient: Patient, group: dist.ProcessGroup) -> float:
    """Bytes per second that each rank of the group sends, at the best size.

    A ring's all-reduce sends 2 (n - 1) / n times the tensor (nccl-tests, PERFORMANCE.md).
    """
    buffer, n = _buffer(patient), group.size()
    sent = 2 * (n - 1) / n
    return best_rate(patient, lambda size: dist.all_reduce(buffer[:size], group=group), sent, n > 1)


def ring_rates(patient: Patient, ring: list[int]) -> list[tuple[int, float]]:
    """(neighbour, bytes per second to and from it) of this rank; none if it is not in the ring."""
    found = []
    for pairs in phases(ring):
        mine = [pair for pair in pairs if patient.ranks.rank in pair]
        other = sum(mine[0]) - patient.ranks.rank if mine else -1
        rate = best_rate(patient, partial(_exchange, patient, other), 1, bool(mine))
        found += [(other, rate)] if mine else []
    return found


def phases(ring: list[int]) -> list[list[tuple[int, int]]]:
    """The pairs of neighbours in a ring, in groups of which no two pairs share a rank."""
    n = len(ring)
    pairs = [(ring[i], ring[(i + 1) % n]) for i in range(n if n > 2 else 1)]
    last = [pairs.pop()] if n > 2 and n % 2 else []  # it touches both of the others' groups
    return [group for group in (pairs[::2], pairs[1::2], last) if group]


def best_rate(
    patient: Patient, send: Callable[[int], object], per_byte: float, active: bool
) -> float:
    """The best of the sizes, in bytes per second; all ranks call it, those not active only wait."""
    best, start = 0.0, time.perf_counter()
    for size in SIZES:
        if size > _largest(patient) or patient.ranks.any(time.perf_counter() - start > SECONDS):
            break
        if active:
            best = max(best, per_byte * size / seconds_of(patient, partial(send, size // 4)))
    return best


def seconds_of(patient: Patient, send: Callable[[], object]) -> float:
    """Of one call, after one that opens connections."""
    send()
    _wait(patient)
    start = time.perf_counter()
    for _ in range(REPEATS):
        send()
    _wait(patient)
    return (time.perf_counter() - start) / REPEATS


def _exchange(patient: Patient, other: int, size: int) -> None:
    buffer = _buffer(patient)
    out, incoming = buffer[:size], torch.empty_like(buffer[:size])
    operations = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, incoming, other)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _buffer(patient: Patient) -> Tensor:
    """fp32; zeros stay zeros however often they are added."""
    return torch.zeros(_largest(patient) // 4, device=patient.ranks.device)


def _largest(patient: Patient) -> int:
    """Bytes: on CPUs all ranks of a host share its memory and its bandwidth."""
    return SIZES[-1] if patient.ranks.device.type == "cuda" else SIZES[1]


def _wait(patient: Patient) -> None:
    if patient.ranks.device.type == "cuda":
        torch.cuda.synchronize(patient.ranks.device)


def _row(what: str, patient: Patient, rates: dict[int, float], slow: list[int]) -> Row:
    least = min(rates, key=lambda rank: rates[rank])
    text = f"{what}: {_rates(rates[least], median(rates.values()))}"
    text += f", least on {patient.meeting.named(slow or [least])}"
    return Row(NAME, Verdict.WARN if slow else Verdict.OK, text, WANTED)


def _rates(least: float, middle: float) -> str:
    return f"{least / 1e9:.3g} GB/s, median {middle / 1e9:.3g}"
