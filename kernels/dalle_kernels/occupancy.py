"""How many programs one multiprocessor holds at a time, by what each of them takes.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the units in
which registers and shared memory are handed out: `cuda_occupancy.h` of the CUDA toolkit.
"""

from __future__ import annotations

from typing import NamedTuple

LANES = 32  # threads of a warp


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor; shared memory in bytes, of which each program costs `reserved`
    more than it asks for."""

    shared: int
    registers: int = 65_536
    warps: int = 64
    programs: int = 32
    reserved: int = 1_024
    registers_unit: int = 256  # of one warp
    warps_unit: int = 4  # one for each of the four schedulers
    shared_unit: int = 128


LIMITS = {80: Multiprocessor(shared=164 * 1024), 90: Multiprocessor(shared=228 * 1024)}


def programs_per_multiprocessor(target: int, warps: int, registers: int, shared: int) -> int:
    """Programs of that many warps, registers of a thread and bytes of shared memory on sm_`target`.

    Raises:
        KeyError: no limits are known for that target.
    """
    limits = LIMITS[target]
    of_warp = _round_up(registers * LANES, limits.registers_unit)
    resident_warps = limits.registers // of_warp // limits.warps_unit * limits.warps_unit
    return min(
        limits.programs,
        limits.warps // warps,
        resident_warps // warps,
        limits.shared // (_round_up(shared, limits.shared_unit) + limits.reserved),
    )


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
