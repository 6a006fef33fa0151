"""One token of all samples per step; on a GPU the step is a CUDA graph, replayed for each position.

A step is hundreds of small kernels: started one by one by the host they take several times as long
as they run.

Shape suffixes: B samples, N image tokens, K codebook entries.
"""

from __future__ import annotations

import torch
from dalle_kernels.devices import launching
from dalle_kernels.sparse_attention import DecodeCache
from torch import Tensor

from dalle_dist.generate.sampler import FREE, Draw, choose


def sample_sequence(draw: Draw) -> Tensor:
    """codes_BN of the samples."""
    state = State(draw)
    positions = range(draw.prefix, draw.tokens)
    if len(positions) > 1 and all(map(_takes_tensors, state.caches)):
        with launching(state.at):  # a graph is recorded on the current device
            _replay(state, len(positions))
    else:
        for position in positions:
            state.step(position)
    return state.codes_BN


def _takes_tensors(cache: object) -> bool:
    return isinstance(cache, DecodeCache) and cache.takes_tensors()


def _replay(state: State, steps: int) -> None:
    state.step(state.at)  # as it is: Triton compiles its kernels, cuBLAS sets itself up
    graph = torch.cuda.CUDAGraph()
    # Other threads, as that of a data loader which pins memory, may go on while it is recorded.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        state.step(state.at)
    for _ in range(steps - 1):
        graph.replay()
    torch.cuda.synchronize()  # before the graph's memory is given back


class State:
    """Tokens of all samples, in memory that stays: a graph writes where it wrote when recorded.

    at      raster position of the next token, int64, of no dimension
    held_B  what it sees: the token before it, or the start of the image
    """

    def __init__(self, draw: Draw) -> None:
        self.draw, self.caches = draw, draw.prefill()
        self.codes_BN = draw.kept_BN.clone()
        self.at = torch.tensor(draw.prefix, device=draw.seed_B.device)
        start_B = torch.full_like(draw.seed_B, draw.model.start)
        self.held_B = self.codes_BN[:, draw.prefix - 1].clone() if draw.prefix else start_B
        self.sample_B = torch.arange(len(start_B), device=start_B.device)

    def step(self, position: int | Tensor) -> None:
        """`position` is `at`, on the host where kernels need it there."""
        draw, at_1 = self.draw, self.at[None]
        logits_BK = draw.logits(self.held_B[:, None], self.caches, position)[:, 0]
        noise_BK = draw.noise(self.sample_B, at_1.expand_as(self.sample_B))
        kept_B = draw.kept_BN.index_select(1, at_1)[:, 0]
        chosen_B = choose(logits_BK, noise_BK, draw.sampling)
        self.held_B.copy_(torch.where(kept_B == FREE, chosen_B, kept_B))
        self.codes_BN.index_copy_(1, at_1, self.held_B[:, None])
        self.at += 1
