"""Examinations of single checks, with hosts and faults that a test puts into each rank."""

from __future__ import annotations

import socket
from dataclasses import replace

from dalle_dist.config import load
from dalle_dist.doctor.checks import CHECKS, examine


def config_of(folder=None, *overrides):
    """The emoji preset, with its folders in `folder`."""
    paths = ("run", "images", "tokens") if folder else ()
    return load("emoji", [*(f"paths.{name}={folder}/{name}" for name in paths), *overrides])


def check(name):
    (found,) = (check for check in CHECKS if check.name == name)
    return found


def rows(ranks, names, config=None, fault=None, **options):
    """Rows as texts; `fault(rank)` is called first, on each rank, and may return a config."""
    changed = fault(ranks.rank) if fault else None
    checks = [check(name) for name in names]
    report = examine(changed or config, ranks, checks=checks, **options)
    return [row.texts for row in report.rows]


def own_host(rank):
    """Each rank believes that it has a host to itself."""
    socket.gethostname = lambda: f"n{rank}"


def with_look(name, look):
    """The check of that name, which looks by another function."""
    return replace(check(name), look=look)
