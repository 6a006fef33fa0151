"""GPUs and cores of every rank, against what was granted and what the config's loaders take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from dalle_dist.distributed.groups import members
from dalle_dist.distributed.launchers import gpu_grant
from dalle_dist.doctor.patient import Patient, grouped, values_of
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.errors import ConfigError

NAME = "devices"
BESIDE_LOADERS = 2  # cores of a rank: its own thread, and those of torch and of communication


def seen(device: torch.device) -> dict[str, Any]:
    """What this rank has: name, UUID, GPUs in sight, the grant of them, cores."""
    found = {
        "name": "CPU",
        "uuid": "",
        "visible": 0,
        "grant": gpu_grant(os.environ) or "",
        "cores": sorted(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "uuid": str(properties.uuid),
            "visible": torch.cuda.device_count(),
        }
    return found


def devices(patient: Patient) -> list[Row]:
    """Rows of what is wrong, and one of what is there."""
    answers = patient.meeting.everywhere(lambda: seen(patient.ranks.device))
    by_rank = values_of(answers)
    rows = patient.failures(NAME, answers)
    rows += [*_twice(patient, by_rank), *_kinds(patient, by_rank), *_unequal(patient)]
    rows += [*_idle(patient, by_rank), *_unused_grant(patient, by_rank)]
    if rows:
        return rows
    hosts = len(set(patient.meeting.hosts))
    text = f"{len(by_rank)} x {by_rank[0]['name']} on {hosts} host{'s' if hosts > 1 else ''}"
    wanted = "one GPU a rank" if patient.ranks.device.type == "cuda" else ""
    return [Row(NAME, Verdict.OK, text, wanted)]


def cores(patient: Patient) -> list[Row]:
    """One row: the rank with the fewest cores that it need not share, against its processes."""
    name = "cores"
    answers = patient.meeting.everywhere(lambda: seen(patient.ranks.device)["cores"])
    rows, by_rank = patient.failures(name, answers), values_of(answers)
    shares = {rank: _share(rank, patient, by_rank) for rank in by_rank}
    fewest = min(shares.values())
    who = [rank for rank, share in shares.items() if share == fewest]
    found = f"{fewest:g} a rank, least on {patient.meeting.named(who)}"
    if patient.config is None:
        return [*rows, Row(name, Verdict.OK, found)]
    workers = patient.config.data.workers
    wanted = workers + BESIDE_LOADERS
    verdict = Verdict.WARN if fewest < wanted else Verdict.OK
    return [*rows, Row(name, verdict, found, f"{wanted} (data.workers {workers} + 2)")]


def _share(rank: int, patient: Patient, by_rank: dict[int, list[int]]) -> float:
    """Cores of a rank, each divided by the ranks of its host that may run on it too."""
    hosts = patient.meeting.hosts
    beside = [set(cores) for other, cores in by_rank.items() if hosts[other] == hosts[rank]]
    return round(sum(1 / sum(core in cores for cores in beside) for core in by_rank[rank]), 2)


def _twice(patient: Patient, by_rank: dict[int, Any]) -> Iterator[Row]:
    for uuid, ranks in grouped({r: found["uuid"] for r, found in by_rank.items()}).items():
        if uuid and len(ranks) > 1:
            text = f"one GPU for {patient.meeting.named(ranks)}"
            yield Row(NAME, Verdict.FAIL, text, "one GPU a rank")


def _kinds(patient: Patient, by_rank: dict[int, Any]) -> Iterator[Row]:
    names = {rank: found["name"] for rank, found in by_rank.items()}
    for name, who in patient.outliers(names).items():
        verdict = Verdict.FAIL if "CPU" in names.values() else Verdict.WARN
        yield Row(NAME, verdict, f"{name} on {who}", "equal devices on all ranks")


def _unequal(patient: Patient) -> Iterator[Row]:
    config = patient.config
    local = (config.parallel.local_world_size or None) if config else None
    try:
        members(patient.meeting.hosts, local)
    except ConfigError as error:
        yield Row(NAME, Verdict.FAIL, str(error), "as many ranks on each host")


def _idle(patient: Patient, by_rank: dict[int, Any]) -> Iterator[Row]:
    """GPUs of a host that no rank uses; a rank that was bound to one sees no others."""
    for host, ranks in grouped(dict(enumerate(patient.meeting.hosts))).items():
        visible = max((by_rank[rank]["visible"] for rank in ranks if rank in by_rank), default=0)
        if visible > max(len(ranks), 1):
            text = f"{visible} GPUs in sight on {host}, for {len(ranks)} ranks"
            yield Row(NAME, Verdict.WARN, text, "a rank for each GPU")


def _unused_grant(patient: Patient, by_rank: dict[int, Any]) -> Iterator[Row]:
    """Where DS_ACCELERATOR=cpu lets a GPU that was granted idle; else joining would have failed."""
    granted = {r: found["grant"] for r, found in by_rank.items() if found["name"] == "CPU"}
    for grant, ranks in grouped(granted).items():
        if grant:
            text = f"{grant}, but the CPU is used, on {patient.meeting.named(ranks)}"
            yield Row(NAME, Verdict.WARN, text, "DS_ACCELERATOR unset")
