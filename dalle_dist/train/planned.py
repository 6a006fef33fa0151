"""What a run was expected to take, said at its start, and beside it what it takes."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch

from dalle_dist.config import Config
from dalle_dist.distributed.groups import members
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import UserError
from dalle_dist.plan import hardware
from dalle_dist.plan.items import Layout
from dalle_dist.plan.plan import Plan, plan
from dalle_dist.plan.text import beside, line

AFTER = 100  # steps of this process, after which it is set beside the plan


class Planned:
    """A plan, or None where there is none: of hardware or settings that nobody has counted."""

    def __init__(self, made: Plan | None) -> None:
        self._made, self._steps = made, 0

    @classmethod
    def of(cls, config: Config, ranks: Ranks) -> Planned:
        """Of stage 2 on these ranks; a collective call."""
        hosts = ranks.gather(socket.gethostname())
        gpu = None
        if ranks.device.type == "cuda":
            gpu = hardware.of_device(torch.cuda.get_device_name(ranks.device))
        if ranks.rank or gpu is None:
            return cls(None)
        nodes = members(hosts, config.parallel.local_world_size or None)
        try:
            return cls(plan(config, Layout(len(nodes), len(nodes[0])), gpu))
        except UserError:  # it trains all the same
            return cls(None)

    def __str__(self) -> str:
        return "" if self._made is None else line(self._made)

    def beside(self, steps: int, numbers: Mapping[str, float]) -> list[str]:
        """Lines with plan and measurement, once, after the first `AFTER` steps; else none.

        Args:
            steps: since the last call.
            numbers: a line of the log.
        """
        before, self._steps = self._steps, self._steps + steps
        if self._made is None or not before < AFTER <= self._steps:
            return []
        return beside(self._made, numbers)
