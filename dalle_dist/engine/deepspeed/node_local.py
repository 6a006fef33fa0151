"""A DeepSpeed `mpu` that restricts data parallelism to one node.

DeepSpeed asks an `mpu` object for its data-parallel group. Given the node's, it shards, reduces,
clips and checkpoints there, as if the node were the world; the mean between nodes is that of
`gradients/node_mean.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.process_group import Ranks


class NodeLocal:
    """DeepSpeed's view of one node: its ranks are all that is data-parallel."""

    def __init__(self, groups: Groups) -> None:
        self._shard, self._alone = groups.shard, groups.alone

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._shard

    def get_data_parallel_world_size(self) -> int:
        return self._shard.size()

    def get_data_parallel_rank(self) -> int:
        return self._shard.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


@torch.no_grad()
def broadcast_weights(model: nn.Module, ranks: Ranks) -> None:
    """Rank 0's weights on every rank: DeepSpeed would spread each node's own."""
    for parameter in model.parameters():
        values = parameter.data.to(ranks.device)
        dist.broadcast(values, src=0)
        parameter.data.copy_(values)
