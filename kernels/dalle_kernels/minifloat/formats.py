"""The two formats (paper 2.4; layout of OpenAI's earlier kernel library blocksparse).

    1-6-9   sign 15 | exponent 14..9  | mantissa 8..0     +-15.984375, least 8.690558e-19
    0-6-10            exponent 15..10 | mantissa 9..0       15.9921875, least 8.682088e-19

An exponent field e stands for 2^(e - 60), so 2^-60 to 2^3; there are no denormals, no infinities
and no NaN. The all-zero word is 0, which takes the place of 2^-60: the least value is the word 1.
"""

from __future__ import annotations

from dataclasses import dataclass

# Biased exponent of 2^-60 in an fp32 word.
LOWEST_EXPONENT = 127 - 60


@dataclass(frozen=True)
class Format:
    """One format, and its landmarks as fp32 words, which sort as their values from 0 upwards."""

    mantissa: int
    signed: bool

    @property
    def dropped(self) -> int:
        """Mantissa bits that an fp32 has more."""
        return 23 - self.mantissa

    @property
    def largest(self) -> int:
        return (LOWEST_EXPONENT + 64 << 23) - (1 << self.dropped)

    @property
    def least(self) -> int:
        return (LOWEST_EXPONENT << 23) + (1 << self.dropped)


FORMATS = {"1-6-9": Format(9, signed=True), "0-6-10": Format(10, signed=False)}
