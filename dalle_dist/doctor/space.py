"""Free memory of devices and hosts, and free disk, against the plan of stage 2."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dalle_dist import storage
from dalle_dist.distributed.groups import members
from dalle_dist.doctor.meeting import HANGS
from dalle_dist.doctor.memory import available
from dalle_dist.doctor.patient import Patient, values_of
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.plan import hardware
from dalle_dist.plan.items import Layout, total
from dalle_dist.plan.plan import plan

GB = 1e9
STAND_IN = "h100-80"  # for CPUs and for GPUs that no plan knows: what is counted here is the same
TEMPORARY = 1 * GB  # of TMPDIR: wheels' caches, Triton's, sockets
_RUN_ITEMS = ("one checkpoint", "checkpoints that are kept", "release")


@dataclass(frozen=True)
class Needs:
    """Bytes by the plan.

    rank  of device memory, at the fullest moment, without CUDA's context
    host  of main memory of one host
    run   of the run folder, once it is full
    save  of one checkpoint
    """

    rank: float
    host: float
    run: float
    save: float


def space(patient: Patient) -> list[Row]:
    """Rows for device memory, host memory, and each place on disk."""
    answer = patient.meeting.on_main(lambda: needs(patient))
    planned = Needs(*answer.value) if answer.value else None
    rows = []
    if answer.error:
        rows.append(Row("plan", Verdict.SKIP, answer.error))
    rows += _device(patient, planned)
    rows += _host(patient, planned)
    return [*rows, *_disks(patient, planned)]


def needs(patient: Patient) -> list[float] | None:
    """Fields of `Needs`; None where there is no plan. Raises UserError as `plan` does."""
    config, meeting = patient.config, patient.meeting
    if config is None or patient.verb != "train":
        return None
    nodes = members(meeting.hosts, config.parallel.local_world_size or None)
    on_gpus = patient.ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(patient.ranks.device) if on_gpus else ""
    gpu = hardware.of_device(name) or hardware.hardware(STAND_IN)
    made = plan(config, Layout(len(nodes), len(nodes[0])), gpu)
    host = total(made.host) * len(nodes) / len(set(meeting.hosts))
    if not on_gpus:  # what would lie on devices lies in main memory
        host += made.memory.total * patient.ranks.world / len(set(meeting.hosts))
    disk = {item.name: item.amount for item in made.disk}
    run = sum(disk[name] for name in _RUN_ITEMS)
    return [made.memory.total, host, run, disk["one checkpoint"]]


def free_on_device(device: torch.device) -> float | None:
    """Bytes; CUDA's context of this process is taken already. None on CPUs."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def _device(patient: Patient, planned: Needs | None) -> list[Row]:
    name = "GPU memory"
    answers = patient.meeting.everywhere(lambda: free_on_device(patient.ranks.device))
    rows, free = patient.failures(name, answers), values_of(answers)
    if free:
        rows.append(_least(name, patient, free, planned.rank if planned else None))
    return rows


def _host(patient: Patient, planned: Needs | None) -> list[Row]:
    name, leaders = "host memory", patient.meeting.leaders
    answers = patient.meeting.on(leaders, available)
    rows, free = patient.failures(name, answers), values_of(answers)
    return [*rows, _least(name, patient, free, planned.host if planned else None)]


def _disks(patient: Patient, planned: Needs | None) -> Iterator[Row]:
    leaders = patient.meeting.leaders
    for name, (folder, need, verdict) in places(patient, planned).items():
        answers = patient.meeting.on(leaders, partial(room, folder), HANGS)
        yield from patient.failures(name, answers)
        if free := values_of(answers):
            yield _least(name, patient, free, need, verdict, f"{folder}: ")


def places(
    patient: Patient, planned: Needs | None
) -> dict[str, tuple[Path, float | None, Verdict]]:
    """By name: a local folder, bytes that it must have room for, and what less room is."""
    config, cache = patient.config, storage.cache_folder()
    found: dict[str, tuple[Path, float | None, Verdict]] = {}
    if config is not None:
        cache = Path(config.data.cache).expanduser() if config.data.cache else cache
        run = patient.run
        if storage.is_remote(run):  # its working copy lies in the cache
            found["disk: run"] = (cache, planned.save if planned else None, Verdict.FAIL)
        else:
            found["disk: run"] = (Path(run), planned.run if planned else None, Verdict.FAIL)
        if storage.is_remote(patient.data):
            found["disk: cache"] = (cache, config.data.cache_gb * GB, Verdict.WARN)
    found["disk: TMPDIR"] = (Path(tempfile.gettempdir()), TEMPORARY, Verdict.WARN)
    return found


def room(folder: Path) -> int:
    """Bytes that `folder` can come to hold: what it holds, and what is free where it is."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    return free + (_held(folder) if there == folder.absolute() else 0)


def _held(folder: Path) -> int:
    if folder == Path(tempfile.gettempdir()):  # others' files
        return 0
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)


def _least(
    name: str,
    patient: Patient,
    free: dict[int, float],
    need: float | None,
    short: Verdict = Verdict.FAIL,
    where: str = "",
) -> Row:
    """The rank with the least; all that have less than `need` are named."""
    least = min(free.values())
    below = [rank for rank, found in free.items() if need is not None and found < need]
    who = below or [rank for rank, found in free.items() if found == least]
    text = f"{where}{least / GB:,.1f} GB, least on {patient.meeting.named(who)}"
    wanted = "" if need is None else f"{need / GB:,.1f} GB"
    return Row(name, short if below else Verdict.OK, text, wanted)
