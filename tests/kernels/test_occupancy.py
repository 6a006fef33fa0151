"""Programs of a multiprocessor against numbers worked out by hand from the published limits."""

import pytest
from dalle_kernels.occupancy import programs_per_multiprocessor


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "programs"),
    [
        (80, 4, 32, 0, 16),  # 64 warps
        (80, 1, 16, 0, 32),  # no more programs than 32
        (80, 4, 255, 0, 2),  # 65,536 registers hold 8 warps of 32 x 256
        (80, 4, 163, 0, 3),  # 12 warps of 32 x 168, of each scheduler the same number
        (90, 8, 129, 0, 1),  # 12 warps of 32 x 136: one and a half programs
        (80, 4, 32, 40 * 1024, 4),  # 164 KiB are four times 40 + 1
        (90, 4, 32, 40 * 1024, 5),  # 228 KiB are five times that
        (90, 4, 32, 75 * 1024, 3),  # exactly three times 75 + 1
        (90, 4, 32, 75 * 1024 + 1, 2),
    ],
)
def test_programs_per_multiprocessor(target, warps, registers, shared, programs):
    assert programs_per_multiprocessor(target, warps, registers, shared) == programs
