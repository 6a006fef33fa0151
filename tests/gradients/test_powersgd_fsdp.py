"""PowerSGD as FSDP2's all-reduce hook, and as DDP's: the same parameters as without either."""

import pytest
import torch
import torch.distributed as dist
from powersgd_oracle import on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dalle_dist.distributed.groups import node_groups
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.algorithm import PowerSGD

STEPS, LR = 4, 1.0
OPTIONS = {"blocks": 1, "rank": 4, "seed": 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(32, 24)
        self.middle = nn.Linear(24, 64)
        self.out = nn.Linear(64, 16)

    def forward(self, x):
        return self.out(torch.tanh(self.middle(torch.tanh(self.into(x)))))


def loss(model, step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, y = torch.randn(8, 32, generator=generator), torch.randn(8, 16, generator=generator)
    return (model(x) - y).square().mean()


def reduce(sgd, named, start):
    """Average {name: rows of a gradient}: matrices compressed, vectors as they are."""
    shards = [Piece(name, start, values, 0) for name, values in named]
    outcome = sgd.reduce(
        [s for s in shards if s.values.ndim == 2], [s for s in shards if s.values.ndim == 1]
    )
    assert not outcome.nonfinite


def _directly(ranks, local_world_size):
    """Plain autograd; gradients averaged over the node; own rows by PowerSGD; rows gathered."""
    groups = node_groups(ranks, local_world_size)
    sgd, model = PowerSGD(groups.replica, **OPTIONS), Net()
    for step in range(STEPS):
        gradients = torch.autograd.grad(loss(model, step, ranks.rank), list(model.parameters()))
        rows = []
        for gradient in gradients:
            dist.all_reduce(gradient, group=groups.shard)
            rows.append(
                gradient.div_(local_world_size).chunk(local_world_size)[groups.shard_rank].clone()
            )
        names = [name for name, _ in model.named_parameters()]
        reduce(sgd, list(zip(names, rows, strict=True)), groups.shard_rank)
        for parameter, mine in zip(model.parameters(), rows, strict=True):
            whole = [torch.empty_like(mine) for _ in range(local_world_size)]
            dist.all_gather(whole, mine, group=groups.shard)
            parameter.data.sub_(torch.cat(whole), alpha=LR)
    return {name: p.detach() for name, p in model.named_parameters()}


def _by_fsdp2(ranks, local_world_size):
    """The hook gets the node's sum of all parameters' rows in one flat buffer."""
    groups = node_groups(ranks, local_world_size)
    sgd, model = PowerSGD(groups.replica, **OPTIONS), Net()
    mesh = DeviceMesh.from_group(groups.shard, "cpu")
    fully_shard(model, mesh=mesh)
    # gloo cannot average: the sum is divided after the hook.
    model.set_force_sum_reduction_for_comms(True)

    def hook(flat):
        flat.div_(local_world_size)
        shapes = [(n, p.to_local().shape) for n, p in model.named_parameters()]
        parts = flat.split([shape.numel() for _, shape in shapes])
        named = [(n, part.view(s)) for (n, s), part in zip(shapes, parts, strict=True)]
        reduce(sgd, named, groups.shard_rank)
        flat.mul_(local_world_size)

    model.set_all_reduce_hook(hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step, ranks.rank).backward()
        optimizer.step()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def _by_ddp(ranks, local_world_size):
    """DDP's hook gets whole gradients: a node of one rank."""
    assert local_world_size == 1
    groups = node_groups(ranks, local_world_size)
    sgd, net = PowerSGD(groups.replica, **OPTIONS), Net()
    model = nn.parallel.DistributedDataParallel(net)

    def hook(_, bucket):
        names = {p: name for name, p in net.named_parameters()}
        named = sorted(
            (names[p], g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)
        )
        reduce(sgd, named, groups.shard_rank)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step, ranks.rank).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("oracle", "world", "local_world_size"),
    [
        (_by_fsdp2, 4, 2),
        pytest.param(_by_fsdp2, 3, 1, marks=pytest.mark.slow),
        pytest.param(_by_ddp, 4, 1, marks=pytest.mark.slow),
    ],
)
def test_hooks_of_torch_give_the_parameters_of_direct_use(oracle, world, local_world_size):
    direct = on_ranks(_directly, world, local_world_size)
    hooked = on_ranks(oracle, world, local_world_size)
    start = {name: p.detach() for name, p in Net().named_parameters()}
    for rank in range(world):
        for name, wanted in direct[rank].items():
            moved = float((wanted - start[name]).norm())
            assert moved > 0.01
            assert float((hooked[rank][name] - wanted).norm()) < 1e-4 * moved
            assert torch.equal(wanted, direct[0][name])
            assert torch.equal(hooked[rank][name], hooked[0][name])
