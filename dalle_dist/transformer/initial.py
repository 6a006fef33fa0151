"""First weights: each element a function of (seed, name of the parameter, index) and nothing else.

So a rank draws the elements that it owns, and any number of ranks starts from the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK = 1 << 16  # elements of one draw, which is always whole: torch's draws have no prefixes


@dataclass(frozen=True)
class Initial:
    """What a parameter starts from: `mean` plus normal numbers of deviation `std`."""

    std: float = 0.0
    mean: float = 0.0


@torch.no_grad()
def fill(out: Tensor, initial: Initial, seed: int, name: str, start: int = 0) -> None:
    """Put the elements of parameter `name` from `start` on into `out`, flat, of any float dtype.

    Drawn in fp32 on the CPU, whose generator gives the same numbers on every machine.
    """
    if not initial.std:
        out.fill_(initial.mean)
        return
    end = start + out.numel()
    for chunk in range(start // CHUNK, -(-end // CHUNK)):
        first = chunk * CHUNK
        low, high = max(start, first), min(end, first + CHUNK)
        values = _draw(seed, name, chunk)[low - first : high - first]
        out[low - start : high - start] = values.mul_(initial.std).add_(initial.mean)


def initialise(module: nn.Module, initials: Mapping[str, Initial], seed: int) -> None:
    """Fill all parameters of a module that lies whole on its device."""
    for name, parameter in module.named_parameters():
        fill(parameter.data.view(-1), initials[name], seed, name)


def _draw(seed: int, name: str, chunk: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}|{name}|{chunk}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(CHUNK, generator=generator)
