"""Waves: which gradients are sent together between nodes, in the order of the backward pass.

A wave is a run of resblocks' matrices. The last layers make the first wave: their gradients are
final when most of the backward pass is still to come, and can be on their way meanwhile. What is no
matrix of a resblock, embeddings and all vectors, makes the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle_dist.gradients.piece import Block

# Of matrices. What the end of the backward pass leaves exposed is one wave; each costs operations
# and two collectives.
WAVES = 4


@dataclass(frozen=True)
class Waves:
    """The waves of a model with this many resblocks."""

    blocks: int

    @property
    def count(self) -> int:
        """How many there are, with the last."""
        return min(WAVES, self.blocks) + 1

    @property
    def last(self) -> int:
        return self.count - 1

    def of(self, block: Block) -> int:
        """The wave of a matrix of this resblock."""
        if block is None:
            return self.last
        return (self.blocks - 1 - block) * self.last // self.blocks
