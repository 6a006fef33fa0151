"""`interface.Engine` by DeepSpeed, of any ZeRO stage. `build.py` makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.backward_sends import BackwardSends
from dalle_dist.engine.deepspeed.nvme import swapped
from dalle_dist.engine.deepspeed.owned_pieces import (
    clear_whole_gradients,
    owned_gradients,
    owned_weights,
    share_whole_gradients,
)
from dalle_dist.engine.deepspeed.owned_state import (
    OwnedState,
    hand_over,
    optimizer_steps,
    set_optimizer_steps,
)
from dalle_dist.engine.deepspeed.versions import shards
from dalle_dist.engine.interface import WEIGHTS, Restoring
from dalle_dist.errors import CheckpointError
from dalle_dist.gradients.piece import Piece, ReadPieces, share
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.gradients.scaling import Telemetry
from dalle_dist.gradients.transform import GradientTransform, SkipDecision
from dalle_dist.optim.outer import MOMENTUM, OuterSGD
from dalle_dist.precision.hardware import computes_in_bf16
from dalle_dist.transformer.registry import with_weights


class DeepSpeedEngine:
    """A model under DeepSpeed on any number of ranks; see `interface.Engine`.

    Args:
        deepspeed_engine: what `deepspeed.initialize` gave.
        accumulation: micro-batches of one optimizer step on each rank.
        groups: where ZeRO stays inside each node; None: it shards over all ranks.
        outer: where nodes train apart, what brings them together.
        early: where means between nodes begin in the backward pass, what begins them.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        accumulation: int,
        ranks: Ranks,
        transform: GradientTransform,
        resblocks: Resblocks,
        groups: Groups | None = None,
        outer: OuterSGD | None = None,
        early: BackwardSends | None = None,
    ) -> None:
        self._engine, self._ranks, self._groups = deepspeed_engine, ranks, groups
        self.transform, self._resblocks = transform, resblocks
        self.shard_rank, self.shard_world, self.nodes = ranks.rank, ranks.world, 1
        if groups is not None:
            self.shard_rank, self.shard_world = groups.shard_rank, groups.local_world_size
            self.nodes = groups.nodes
        self._decision, self._reduced = SkipDecision(), False
        self.skipped, self.optimizer = False, type(deepspeed_engine.basic_optimizer).__name__
        self.zero_stage = shards(deepspeed_engine)
        self.accumulation = accumulation
        whole_shape = "ds_shape" if self.zero_stage == 3 else "shape"
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(getattr(parameter, whole_shape))
            for name, parameter in self.module.named_parameters()
        }
        self._outer, self._early = outer, early
        if outer is not None:
            outer.restart(self.owned())

    @property
    def settled(self) -> bool:
        return self._outer is None or self._outer.settled

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *inputs: Any) -> Tensor:
        output: Tensor = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor, hold: bool = False) -> None:
        """See `interface.Engine`.

        DeepSpeed's division by the ranks is undone here, and its division by the accumulation steps
        left out. In fp16 the block scales make up for it, and it is undone after the reduction
        (paper appendix D).
        """
        factor = 1 if self.transform.scaling is not None else self._ranks.world
        last = self._engine.is_gradient_accumulation_boundary()
        if last and self._early is not None and not hold:
            self._early.watch()
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # only counts

    @torch.no_grad()
    def reduce(self, sums: Tensor | None = None, measure: bool = False) -> list[float]:
        copies = self._ranks.world // (self.shard_world if self.zero_stage else 1)
        gradients = self.gradients() if self.transform.active else []
        if self._early is not None:
            self._early.end(gradients)
        self._decision, totals = self.transform.apply(gradients, copies, measure, sums)
        self._reduced = True
        return totals

    @torch.no_grad()  # DeepSpeed 0.18.9 gathers weights in place into a tensor of a graph
    def apply(self, lr: float) -> Tensor:
        if not self._reduced:
            self.reduce()
        norm = self._apply(lr)
        if self._outer is not None and self._outer.count():
            self.settle()
        return norm

    @torch.no_grad()
    def settle(self) -> None:
        if self._outer is not None and not self._outer.settled:
            owned = self._state()
            self._outer.step(owned.pieces[WEIGHTS])
            owned.put_back()

    def _apply(self, lr: float) -> Tensor:
        optimizer, decision = self._engine.basic_optimizer, self._decision
        self._reduced = False
        for group in optimizer.param_groups:
            group["lr"] = lr
        if self._groups is not None:
            share_whole_gradients(self._engine.optimizer, self.gradients(), self._groups.shard)
        self.skipped = optimizer.skip = decision.skip
        if decision.skip:
            self._clear_gradients()
        plain = None if self._engine.optimizer is not optimizer else _norm(self.module)
        frozen = decision.frozen
        optimizer.frozen = [p.values for p in self.owned() if p.name in frozen] if frozen else ()
        try:
            self._engine.step()
        finally:
            optimizer.frozen = ()
        if plain is not None:
            return plain
        # DeepSpeed looks at the norm, and goes no further where it is not finite.
        if getattr(self._engine.optimizer, "overflow", False):
            return torch.tensor(math.inf)
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def step(self, lr: float, measure: bool = False) -> float:
        self.reduce(measure=measure)
        return self.apply(lr).item()

    def gradients(self) -> list[Piece]:
        return self._pieces(owned_gradients)

    def _clear_gradients(self) -> None:
        """Of a step that is skipped: the norm of what is not finite says nothing."""
        if self.zero_stage == 0:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            return
        if self.zero_stage == 3 and swapped(self._engine.optimizer):
            return  # DeepSpeed has taken their norm as they came, and AdamW is told to `skip`
        for piece in self.gradients():
            piece.values.zero_()
        clear_whole_gradients(self._engine.optimizer)

    def weights(self) -> list[Piece]:
        return share(self.owned(), *self._replica)

    def owned(self) -> list[Piece]:
        """All fp32 weights that this rank updates, as views; replicas have the same."""
        return self._pieces(owned_weights)

    @property
    def _replica(self) -> tuple[int, int]:
        """(which this rank is, of how many) among those that own the same pieces."""
        if self.zero_stage == 0:
            return self._ranks.rank, self._ranks.world
        return (0, 1) if self._groups is None else (self._groups.node, self._groups.nodes)

    def _state(self) -> OwnedState:
        blocks = self._resblocks.of
        return OwnedState(self.module, self._engine, self.zero_stage, self.shard_rank, blocks)

    def state(self) -> dict[str, list[Piece]]:
        owned = self._state().pieces
        return {kind: share(pieces, *self._replica) for kind, pieces in owned.items()}

    @property
    def optimizer_steps(self) -> int:
        return optimizer_steps(self._engine.basic_optimizer)

    @contextmanager
    def restoring(self) -> Iterator[Restoring]:
        owned = self._state()
        index, count = self._replica
        shares = {kind: share(pieces, index, count) for kind, pieces in owned.pieces.items()}
        restoring = Restoring(shares)
        yield restoring
        if count > 1:
            group = dist.group.WORLD if self._groups is None else self._groups.replica
            hand_over(owned.pieces, group)  # type: ignore[arg-type]
        if restoring.steps is not None:
            set_optimizer_steps(self._engine.basic_optimizer, restoring.steps)
        owned.put_back()
        if self._outer is not None:
            self._outer.restart(owned.pieces[WEIGHTS])

    def _pieces(self, find: Callable[..., list[Piece]]) -> list[Piece]:
        optimizer, blocks = self._engine.optimizer, self._resblocks.of
        return find(self.module, optimizer, self.zero_stage, self.shard_rank, blocks)

    def telemetry(self) -> Telemetry:
        return self.transform.telemetry()

    def transform_state(self) -> tuple[dict[str, Any], dict[str, list[Piece]]]:
        numbers, tensors = self.transform.state()
        if self._outer is not None:
            tensors[MOMENTUM] = self._outer.state()
        index, count = self._replica
        return numbers, {kind: share(found, index, count) for kind, found in tensors.items()}

    def load_transform_state(self, numbers: Mapping[str, Any], read: ReadPieces) -> None:
        self.transform.load_state(numbers, self.owned(), read)
        if self._outer is not None:
            self._outer.load_state(read)

    @contextmanager
    def sampling_model(self, build: Callable[[], nn.Module]) -> Iterator[nn.Module | None]:
        """See `interface.Engine`.

        Under ZeRO-3 the weights are gathered one by one into a model made by `build`, on GPUs in
        16 bits; otherwise it is the trained module itself.
        """
        main = self._ranks.rank == 0
        if self.zero_stage < 3:
            self._engine.eval()
            yield self.module if main else None
            self._engine.train()
        else:
            state = self._gather()
            yield with_weights(build, state) if main else None
        self._ranks.barrier()

    def _gather(self) -> dict[str, Tensor]:
        """On rank 0 all weights, those of layers in the dtype that GPUs sample in."""
        import deepspeed

        state, dtype, device = {}, torch.float32, self._ranks.device
        if device.type == "cuda":
            dtype = torch.bfloat16 if computes_in_bf16(device) else torch.float16
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self._ranks.rank == 0:
                    kept = dtype if name in self._resblocks.of else torch.float32
                    state[name] = parameter.detach().to(device, kept, copy=True)
        return state

    def refuse_diverged(self) -> None:
        if self._groups is None:
            return
        bits = [p.values.view(torch.int32).sum(dtype=torch.int64) for p in self.owned()]
        sums = torch.stack(bits or [torch.zeros((), dtype=torch.int64)]).to(self._ranks.device)
        first = sums.clone()
        dist.broadcast(first, dist.get_global_rank(self._groups.replica, 0), self._groups.replica)
        if self._ranks.any(not first.equal(sums)):
            raise CheckpointError(
                "the nodes' weights differ, which their all-reduces should make impossible; resume "
                "from the last checkpoint, and look for hardware that is not like the rest"
            )


def _norm(module: nn.Module) -> Tensor:
    """DeepSpeed keeps no norm for fp32 without ZeRO; gradients are reduced by now."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
