"""What the places of ranks say of a hang: one message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dalle_dist.watch.place import Place

SHOWN = 8  # places in one message, each of which may have many ranks


@dataclass(frozen=True)
class Stuck:
    """What a rank says of itself.

    step   that it makes, or makes next
    doing  step, saving, evaluation ...
    """

    step: int
    doing: str
    place: Place = field(default_factory=lambda: Place(""))


def verdict(found: Mapping[int, Stuck], hosts: Mapping[int, str], seconds: float) -> str:
    """One line: which ranks are where, those first that hold up the others.

    Args:
        found: what ranks have said; those that are missing are silent.
        hosts: of all ranks that were asked.
        seconds: for which there was no progress.
    """
    usual = min(found.values(), key=lambda stuck: stuck.step)
    parts = [_silent(sorted(hosts.keys() - found.keys()), hosts)]
    groups: dict[Stuck, list[int]] = {}
    for rank, stuck in sorted(found.items()):
        groups.setdefault(stuck, []).append(rank)
    ordered = sorted(groups, key=lambda stuck: (bool(stuck.place.collective), len(groups[stuck])))
    parts += [_together(stuck, groups[stuck], hosts, usual) for stuck in ordered[:SHOWN]]
    if len(ordered) > SHOWN:
        parts.append(f"{len(ordered) - SHOWN} more places")
    what = f"step {usual.step}" if usual.doing == "step" else f"{usual.doing} at step {usual.step}"
    told = "; ".join(part for part in parts if part)
    return f"{what} has made no progress for {seconds:.0f} s: {told}"


def named(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """ "rank 5 (host gpu07)" or "ranks 0-4, 6-15"; hosts where ranks are few."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} (host {hosts[ranks[0]]})"
    known = sorted({hosts[rank] for rank in ranks})
    shown = f" (host {known[0]})" if len(known) == 1 < len(set(hosts.values())) else ""
    return f"ranks {_spans(ranks)}{shown}"


def _silent(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    if not ranks:
        return ""
    verb = "does" if len(ranks) == 1 else "do"
    return f"{named(ranks, hosts)} {verb} not answer (dead, stopped, starved or cut off)"


def _together(stuck: Stuck, ranks: Sequence[int], hosts: Mapping[int, str], usual: Stuck) -> str:
    place, one = stuck.place, len(ranks) == 1
    elsewhere = "" if stuck.step == usual.step else f", at step {stuck.step}"
    if stuck.doing != usual.doing:
        elsewhere += f", {stuck.doing}"
    if place.collective:
        verb = "waits" if one else "wait"
        return f"{named(ranks, hosts)} {verb} in {place.collective} ({place.where}{elsewhere})"
    reason = f"waits for {place.waits}" if place.waits else "not in a collective"
    return f"{named(ranks, hosts)} {'is' if one else 'are'} in {place.where}{elsewhere}, {reason}"


def _spans(ranks: Sequence[int]) -> str:
    """ "0-4, 6" of 0 1 2 3 4 6."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
