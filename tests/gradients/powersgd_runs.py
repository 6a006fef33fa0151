"""What the tests of PowerSGD share: it on the ranks of a test, and comparisons."""

import hashlib
import importlib.util

import pytest
import torch.distributed as dist
from powersgd_oracle import BLOCKS, COMPRESSED, DENSE, RANK, shards

from dalle_dist.distributed.groups import node_groups
from dalle_dist.gradients.powersgd.algorithm import PowerSGD
from dalle_dist.gradients.powersgd.options import PowerSGDOptions

CLUSTERS = [(4, 2), (3, 1), (4, 1)]
needs_minifloat = pytest.mark.skipif(
    importlib.util.find_spec("dalle_kernels.minifloat") is None,
    reason="needs the minifloat package",
)
COMM_DTYPES = ["fp32", "bf16", "fp16", pytest.param("1-6-9", marks=needs_minifloat)]
ERROR_DTYPES = ["fp32", pytest.param("1-6-9", marks=needs_minifloat)]


def build(ranks, local_world_size, rank=RANK, seed=0, **options):
    groups = node_groups(ranks, local_world_size)
    options = PowerSGDOptions(**options)
    sgd = PowerSGD(
        groups.replica, flag_group=dist.group.WORLD, rank=rank, blocks=BLOCKS, seed=seed,
        options=options,
    )  # fmt: skip
    return sgd, groups


def run(ranks, local_world_size, options, steps, state=None, first=0):
    """Outputs of each step by name, the state, and what the last step said."""
    sgd, groups = build(ranks, local_world_size, **options)
    if state is not None:
        sgd.load_state_dict(state[groups.shard_rank])
    outputs = []
    for step in range(first, first + steps):
        compressed = shards(COMPRESSED, step, groups.node, groups.shard_rank)
        dense = shards(DENSE, step, groups.node, groups.shard_rank)
        outcome = sgd.reduce(compressed, dense, measure=step == first + steps - 1)
        outputs.append({s.name: s.values for s in compressed + dense})
    return outputs, sgd.state_dict(), outcome


def check_close(found, wanted, bound):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= bound, f"relative error {error:.2g}"


def digest(outputs):
    parts = [v.numpy().tobytes() for step in outputs for v in step.values()]
    return hashlib.blake2b(b"".join(parts)).hexdigest()
