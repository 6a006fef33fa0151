"""Figures of GPUs and wires, from `hardware.yaml`; a benchmark makes one by measurement instead."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from dalle_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU in its node; units and meanings stand in `hardware.yaml`.

    wire  bits per second of a node
    """

    name: str
    device: str
    source: str
    peak_16: float
    peak_fp32: float
    peak_tf32: float
    memory: float
    bandwidth: float
    link: float
    wire: float
    bf16: bool
    gemm_share: float
    fp32_share: float
    memory_share: float
    optimizer_share: float
    copy_share: float
    link_share: float
    wire_share: float
    attention_forward_share: float
    attention_backward_share: float
    overlap: float
    launch_s: float
    module_s: float
    gradient_s: float
    factor_s: float
    collective_s: float
    host_link: float
    decode_share: float
    asynchronous: bool
    context: float
    usable: float


def hardware(name: str, wire: float | None = None) -> Hardware:
    """The GPU of that name; `wire` (Gbit/s of a node) replaces what the file says.

    Raises ConfigError: a name that the file does not have.
    """
    found = _file()
    if name not in found["gpus"]:
        raise ConfigError(f"--gpu {name}: is not one of {', '.join(found['gpus'])}")
    figures = {**found["assumed"], **found["gpus"][name]}
    figures["wire"] = 1e9 * (figures["wire"] if wire is None else wire)
    return Hardware(name=name, **figures)


def of_device(device: str) -> Hardware | None:
    """That of a GPU by the name that torch gives it; None: the file has none like it."""
    for name, figures in _file()["gpus"].items():
        if re.search(figures["device"], device):
            return hardware(name)
    return None


def names() -> list[str]:
    return list(_file()["gpus"])


@functools.cache
def _file() -> dict[str, Any]:
    text = resources.files("dalle_dist.plan").joinpath("hardware.yaml").read_text()
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree
