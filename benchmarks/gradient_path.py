"""Host time of the gradient path per update, at the depth of the 12B model and next to no size.

64 layers of matrices of 16x16 as ZeRO-3 keeps them, one after the other in a flat buffer: what is
left is Python and launches. fp16 scales, PowerSGD between nodes, a group of one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from benchmarks.common import Measured
from dalle_dist.config import load
from dalle_dist.distributed import process_group
from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.gradients.node_mean import NodeMean
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.gradients.scaling import BlockScaling
from dalle_dist.gradients.transform import GradientTransform
from dalle_dist.precision.scales import BlockScales

LAYERS, WIDTH, RANK = 64, 16, 2
PER_ROUND = 5  # updates


class Dispatches(TorchDispatchMode):
    """Counts the operations of torch that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    options = common.arguments(__doc__, rounds=15)
    ranks = process_group.init()
    config = load("12b", ["name=smoke"] if options.smoke else [])
    update = one_update(2 if options.smoke else LAYERS, ranks)
    for _ in range(3):
        update()
    times = [common.seconds(lambda: [update() for _ in range(PER_ROUND)]) / PER_ROUND
             for _ in range(options.rounds)]  # fmt: skip
    with Dispatches() as dispatches:
        update()
    rows = [
        Measured("ours", "gradient path's host time", "ms", [1e3 * t for t in times]),
        Measured("ours", "operations of torch", "", [float(dispatches.count)]),
    ]
    common.report("gradient_path", config, rows, options, ranks.device)
    process_group.shutdown()


def parameters(layers: int, width: int) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """(name, resblock, shape) of a transformer's parameters, in their order."""
    yield "text_embedding.weight", None, (4 * width, width)
    for layer in range(layers):
        for part, block in (("attention", 2 * layer), ("mlp", 2 * layer + 1)):
            name = f"blocks.{layer}.{part}"
            yield f"{name}.norm.weight", block, (width,)
            yield f"{name}.norm.bias", block, (width,)
            into, hidden = ("qkv", 3 * width) if part == "attention" else ("up", 4 * width)
            out = "out" if part == "attention" else "down"
            yield f"{name}.{into}.weight", block, (hidden, width)
            yield f"{name}.{into}.bias", block, (hidden,)
            rows = width if part == "attention" else 4 * width
            yield f"{name}.{out}.weight", block, (rows, width)
            yield f"{name}.{out}.bias", block, (width,)
    yield "norm.weight", None, (width,)
    yield "text_unembedding.weight", None, (4 * width, width)


def one_update(layers: int, ranks: Ranks) -> Callable[[], object]:
    named = list(parameters(layers, WIDTH))
    matrices = {n: s for n, b, s in named if b is not None and len(s) == 2}
    resblocks = Resblocks(
        count=2 * layers,
        of={name: block for name, block, _ in named if block is not None},
        matrices={name: (shape[0], shape[1]) for name, shape in matrices.items()},
        stacked={name: 3 for name in matrices if name.endswith("qkv.weight")},
    )
    world = dist.group.WORLD
    assert world is not None
    # Two nodes by its word, so that it compresses; one process, so that nothing is sent.
    groups = Groups(world, world, node=0, shard_rank=0, nodes=2, local_world_size=1, alone=world)
    mean = NodeMean(resblocks, groups, ranks, rank=RANK, cuts=1, seed=0, options=PowerSGDOptions())
    scaling = BlockScaling(BlockScales(2 * layers, 1, ranks.device), resblocks, ranks)
    transform = GradientTransform(resblocks, ranks, "block", scaling, mean)
    sizes = [functools.reduce(int.__mul__, shape) for _, _, shape in named]
    torch.manual_seed(0)
    gradient = torch.randn(sum(sizes)).to(ranks.device)
    flat = gradient.clone()

    def pieces(flat: Tensor) -> list[Piece]:
        parts = flat.split(sizes)
        return [Piece(n, 0, part, b) for (n, b, _), part in zip(named, parts, strict=True)]

    def update() -> None:
        flat.copy_(gradient)
        transform.apply(pieces(flat), 1, False)

    return update


if __name__ == "__main__":
    main()
