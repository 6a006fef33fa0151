"""Whether all ranks run the same code by the same config."""

from __future__ import annotations

import hashlib
from pathlib import Path

import dalle_kernels

import dalle_dist
from dalle_dist.config import Config, difference, to_dict, to_yaml
from dalle_dist.doctor.patient import NO_CONFIG, Patient, grouped, values_of
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.train.starts import code_state

DIGITS = 12  # of a hash, shown
MOST = 3  # keys named of those that differ


def code(patient: Patient) -> list[Row]:
    """One row: the hash of our Python files, and the revision where a repository has them."""
    name, wanted = "same code", "one on all ranks"
    answers = patient.meeting.everywhere(code_hash)
    rows = patient.failures(name, answers)
    groups = grouped(values_of(answers))
    if len(groups) > 1:
        found = "; ".join(f"{h} on {patient.meeting.named(r)}" for h, r in groups.items())
        return [*rows, Row(name, Verdict.FAIL, found, wanted)]
    revision = patient.meeting.on_main(_revision).value
    found = ", ".join([*groups, *([f"git {revision}"] if revision else [])])
    return [*rows, Row(name, Verdict.OK, found, wanted)]


def config(patient: Patient) -> list[Row]:
    """One row; where configs differ, the first keys in which they do."""
    name, mine = "same config", patient.config
    if mine is None:
        return [Row(name, Verdict.SKIP, NO_CONFIG)]
    answers = patient.meeting.everywhere(lambda: config_hash(mine))
    rows, by_rank = patient.failures(name, answers), values_of(answers)
    groups = grouped(by_rank)
    if len(groups) == 1:
        return [*rows, Row(name, Verdict.OK, f"{next(iter(groups))} ({mine.name})")]
    odd = min(reversed(groups.values()), key=len)  # of two ranks, not rank 0
    others = next(ranks for ranks in groups.values() if ranks is not odd)
    speakers = (others[0], odd[0])
    trees = patient.meeting.everywhere(
        lambda: to_dict(mine) if patient.ranks.rank in speakers else None
    )
    keys = difference(*(trees[rank].value for rank in speakers))
    text = f"{patient.meeting.named(odd)} differs: {'; '.join(keys[:MOST])}"
    more = f" and {len(keys) - MOST} more keys" if len(keys) > MOST else ""
    return [*rows, Row(name, Verdict.FAIL, text + more, "one on all ranks")]


def code_hash() -> str:
    """Of the Python files of both packages, by their names and contents."""
    digest = hashlib.sha256()
    for package in (dalle_dist, dalle_kernels):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{file.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:DIGITS]


def config_hash(config: Config) -> str:
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:DIGITS]


def _revision() -> str:
    """Of the checkout that the package lies in, with `+` if it has changes; empty: of none."""
    state = code_state()
    return state.get("revision", "")[:DIGITS] + "+" * bool(state.get("changes"))
