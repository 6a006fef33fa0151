"""PowerSGD of K replicas in one process, in fp64, one shard at a time; and gradients for tests."""

import pickle

import torch

from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.orthogonal import gaussian_RN
from dalle_dist.testing import run_distributed

RANK = 4
# Wide, square, tall, and two of one shape in one block.
COMPRESSED = {
    "head": (None, (10, 30)),
    "0.qkv": (0, (24, 40)),
    "0.out": (0, (16, 16)),
    "1.up": (1, (12, 40)),
    "1.gate": (1, (12, 40)),
    "1.tall": (1, (48, 16)),
}
DENSE = {"0.gain": (0, (40,)), "embedding": (None, (10, 6))}
BLOCKS = 2


def gradient(name, step, replica, local=0):
    """A random gradient; replicas agree in half of it, as the samples of a batch do."""
    _, shape = (COMPRESSED | DENSE)[name]

    def draw(*key):
        generator = torch.Generator().manual_seed(hash(key) % 2**31)
        return torch.randn(shape, generator=generator)

    number = [*COMPRESSED, *DENSE].index(name)
    return draw(number, step, local) + draw(number, step, local, replica + 1)


def mean_gradient(name, step, replicas, local=0):
    return sum(gradient(name, step, i, local).double() for i in range(replicas)) / replicas


def shards(names, step, replica, local=0):
    table = COMPRESSED | DENSE
    return [
        Piece(name, local, gradient(name, step, replica, local), table[name][0]) for name in names
    ]


class SlowPowerSGD:
    """The equations of powersgd.py's docstring, for every replica of every shard by itself."""

    def __init__(self, rank, seed=0, local=0):
        self.rank, self.seed, self.local = rank, seed, local
        self.errors = {}

    def reduce(self, name, gradients):
        """The output for the replicas' gradients of one shard."""
        if name not in self.errors:
            self.errors[name] = [torch.zeros_like(g) for g in gradients]
        sums = [e + g for e, g in zip(self.errors[name], gradients, strict=True)]
        upright = sums[0].shape[0] <= sums[0].shape[1]
        matrices = sums if upright else [s.T for s in sums]
        key = f"{name}@{self.local}"
        q = gaussian_RN(self.seed, key, self.rank, matrices[0].shape[1]).double().T
        p = torch.stack([m @ q for m in matrices]).mean(0)
        p, _ = torch.linalg.qr(p + 1e-6 * torch.eye(*p.shape, dtype=p.dtype))
        q = torch.stack([m.T @ p for m in matrices]).mean(0)
        output = p @ q.T if upright else q @ p.T
        self.errors[name] = [s - output for s in sums]
        return output

    def mean_error(self, name):
        return torch.stack(self.errors[name]).mean(0)

    def resume(self, replicas):
        """Every replica's error := the mean; `replicas` of them from now on."""
        self.errors = {name: [self.mean_error(name)] * replicas for name in self.errors}


def on_ranks(fn, world, *args):
    """`run_distributed`, but tensors come back by value: their processes need not outlive them."""
    return [pickle.loads(text) for text in run_distributed(_pickled, world, fn, *args)]


def _pickled(ranks, fn, *args):
    found = pickle.dumps(fn(ranks, *args))
    # Who leaves first must not break a connection that a slower rank still reads from.
    ranks.barrier()
    return found
