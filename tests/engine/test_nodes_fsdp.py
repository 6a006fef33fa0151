"""The same transformer under DeepSpeed and under FSDP2, PowerSGD between the nodes of both."""

import contextlib
import io

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dalle_dist.distributed.groups import node_groups
from dalle_dist.gradients.node_mean import NodeMean
from dalle_dist.gradients.piece import Piece, assemble
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.transform import GradientTransform, SkipDecision
from dalle_dist.optim.adamw import AdamW
from dalle_dist.optim.param_groups import param_groups
from dalle_dist.testing import run_distributed
from dalle_dist.transformer.blocks import resblock_map
from tests.engine.test_fp16 import backward, config_of, model_of
from tests.engine.test_nodes import build_on, config_on

# A large eps: with a small one the first steps are the signs of gradients that rounding decides.
PLAIN = ("train.precision=fp32", "train.clip=0", "train.eps=1e-2")
# Of a node of two: every stage then cuts each matrix in two, as FSDP2 does.
OF_MACHINE = ("parallel.rank_of=node", "parallel.rank=16")
UPDATES, LR = 4, 3e-2


def by_deepspeed(ranks, stage):
    engine = build_on(ranks, stage, "powersgd", *PLAIN, *OF_MACHINE)
    with contextlib.redirect_stdout(io.StringIO()):
        for number in range(UPDATES):
            backward(engine, ranks, number, 24)
            engine.step(LR)
    mine = {f.key: f.values.detach().clone() for f in engine.weights()}
    every = {key: values for part in ranks.gather(mine) for key, values in part.items()}
    return {name: whole.numpy() for name, whole in assemble(every, engine.shapes).items()}


def children_first(module, prefix=""):
    """Names of all parameters in the order in which FSDP2 packs them."""
    for name, child in module.named_children():
        yield from children_first(child, f"{prefix}{name}.")
    yield from (prefix + name for name, _ in module.named_parameters(recurse=False))


class ByFSDP2:
    """What `backward` needs of an engine; gradients are averaged by FSDP2's all-reduce hook."""

    def __init__(self, ranks):
        self.config, self.accumulation = config_on(ranks, 3, "powersgd", *PLAIN, *OF_MACHINE), 1
        self.groups, self.module = node_groups(ranks, 2), model_of(self.config)
        self.resblocks = resblock_map(self.module)
        mean = NodeMean(
            self.resblocks, self.groups, ranks, rank=8, cuts=2, seed=self.config.seed,
            options=PowerSGDOptions(),
        )  # fmt: skip
        self.transform = GradientTransform(self.resblocks, ranks, node_mean=mean)
        named = dict(self.module.named_parameters())
        self.shapes = {name: tuple(named[name].shape) for name in children_first(self.module)}
        fully_shard(self.module, mesh=DeviceMesh.from_group(self.groups.shard, "cpu"))
        self.module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
        self.module.set_all_reduce_hook(self.hook)
        self.local = {name: p.to_local().detach() for name, p in self.module.named_parameters()}
        decayed, others = param_groups(
            self.module, self.resblocks.matrices, self.config.train.weight_decay
        )
        names = {id(p): name for name, p in self.module.named_parameters()}
        for group in (decayed, others):
            group["params"] = [self.local[names[id(p)]] for p in group["params"]]
        train = self.config.train
        self.optimizer = AdamW(
            [decayed, others], lr=LR, betas=(train.beta1, train.beta2), eps=train.eps,
            variance_clip=train.variance_clip,
        )  # fmt: skip

    def __call__(self, *batch):
        return self.module(*batch)

    def backward(self, loss):
        (loss * self.groups.nodes).backward()

    def hook(self, flat):
        """The node's sums of all parameters' rows, one after the other and filled up."""
        fragments, at = [], 0
        for name, shape in self.shapes.items():
            rows = -(-shape[0] // 2)
            width = flat.numel() and int(torch.Size(shape[1:]).numel())
            mine = min(rows, shape[0] - self.groups.shard_rank * rows) * width
            start = self.groups.shard_rank * rows * width
            block = self.resblocks.of.get(name)
            fragments.append(Piece(name, start, flat[at : at + mine], block))
            at += rows * width
        assert at == flat.numel()
        assert self.transform.apply(fragments, 1, False) == (SkipDecision(), [])
        flat.mul_(self.groups.local_world_size)  # FSDP2 divides by it afterwards

    def step(self):
        for name, parameter in self.module.named_parameters():
            self.local[name].grad = parameter.grad.to_local()
            parameter.grad = None
        self.optimizer.step()


def by_fsdp2(ranks):
    with contextlib.redirect_stdout(io.StringIO()):
        other = ByFSDP2(ranks)
        for number in range(UPDATES):
            backward(other, ranks, number, 24)
            other.step()
    named = other.module.named_parameters()
    return {name: p.full_tensor().detach().numpy() for name, p in named}


@pytest.fixture(scope="module")
def fsdp2():
    return run_distributed(by_fsdp2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_and_fsdp2_give_the_same_parameters(fsdp2, stage):
    """A rank that is a node's total is divided among the same shards under every stage."""
    found = run_distributed(by_deepspeed, 4, stage)[0]
    start = dict(model_of(config_of(stage, "train.micro_batch=8", *PLAIN)).named_parameters())
    assert found.keys() == fsdp2[0].keys() == start.keys()
    apart = {}
    for name, values in found.items():
        moved = np.linalg.norm(values - start[name].detach().numpy())
        apart[name] = np.linalg.norm(values - fsdp2[0][name]) / moved
    assert {name: far for name, far in apart.items() if not far < 1e-3} == {}
