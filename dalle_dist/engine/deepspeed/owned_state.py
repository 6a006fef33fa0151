"""All that a rank owns of weights and moments under DeepSpeed, to be read or replaced in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_dist.engine.deepspeed.nvme import mapped_moments, swapped, weights_from_files
from dalle_dist.engine.deepspeed.owned_pieces import optimized, owned_weights
from dalle_dist.engine.interface import MEAN, STATE, VARIANCE, WEIGHTS
from dalle_dist.gradients.piece import Piece, share
from dalle_dist.optim.adamw import AdamW


class OwnedState:
    """`pieces` by kind, as views; what is written to them counts from `put_back` on.

    Args:
        engine: DeepSpeed's.
        blocks: number of its resblock, by the name of each parameter that is in one.
    """

    def __init__(
        self,
        module: nn.Module,
        engine: Any,
        stage: int,
        shard_rank: int,
        blocks: Mapping[str, int],
    ) -> None:
        self._engine, self._stage = engine, stage
        self._adamw: AdamW = engine.basic_optimizer
        self._copies: list[tuple[Tensor, Tensor]] = []
        if stage == 0:
            named = optimized(module, engine.optimizer)
            self.pieces = {
                kind: [Piece(name, 0, self._flat(of), blocks.get(name)) for name, of in found]
                for kind, found in self._whole(named).items()
            }
        else:
            weights = owned_weights(module, engine.optimizer, stage, shard_rank, blocks)
            self.pieces = {WEIGHTS: weights} | self._moments(module, weights)

    def _whole(self, named: list[tuple[str, Tensor]]) -> dict[str, list[tuple[str, Tensor]]]:
        groups = {id(p): group for group in self._adamw.param_groups for p in group["params"]}
        states = [(name, self._adamw.state_of(p, groups[id(p)])) for name, p in named]
        moments = {kind: [(name, s[kind]) for name, s in states] for kind in (MEAN, VARIANCE)}
        return {WEIGHTS: [(name, tensor.detach()) for name, tensor in named]} | moments

    def _flat(self, tensor: Tensor) -> Tensor:
        """In the order of its elements; of a tensor that lies otherwise in memory, a copy."""
        if tensor.is_contiguous():
            return tensor.view(-1)
        copy = tensor.reshape(-1)
        self._copies.append((tensor, copy))
        return copy

    def _moments(self, module: nn.Module, weights: list[Piece]) -> dict[str, list[Piece]]:
        found: dict[str, list[Piece]] = {MEAN: [], VARIANCE: []}
        flats, optimizer = self._flats(), self._engine.optimizer
        named: dict[str, Any] = {}
        on_nvme: dict[int, dict[str, Tensor]] = {}
        if self._stage == 3:
            named, on_nvme = dict(module.named_parameters()), mapped_moments(optimizer, self._adamw)
        for piece in weights:
            number, offset = -1, 0
            if on_nvme:
                number, offset, _ = optimizer.grad_position[named[piece.name].ds_id]
            if number in on_nvme:
                state = on_nvme[number]
            else:
                flat, group, offset = _holder(piece, flats)
                state = self._adamw.state_of(flat, group)
            for kind, pieces in found.items():
                values = state[kind].view(-1)[offset : offset + piece.values.numel()]
                pieces.append(Piece(piece.name, piece.start, values, piece.block))
        return found

    def _flats(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """What the optimizer updates under ZeRO, each with its group of options."""
        groups = self._adamw.param_groups
        if self._stage == 3:  # which puts them into the groups during a step alone
            optimizer = self._engine.optimizer
            numbers = optimizer.sub_group_to_group_id
            flats = enumerate(optimizer.fp32_partitioned_groups_flat)
            return [(flat, groups[numbers[number]]) for number, flat in flats]
        return [(flat, group) for group in groups for flat in group["params"]]

    @torch.no_grad()
    def put_back(self) -> None:
        """Have the model compute with the weights that are in the pieces now."""
        for tensor, copy in self._copies:
            tensor.copy_(copy.view(tensor.shape))
        optimizer = self._engine.optimizer
        if self._stage == 3:
            on_nvme = swapped(optimizer)
            for number in range(len(optimizer.fp16_groups)):
                if number in on_nvme:
                    weights_from_files(optimizer, number)
                else:
                    optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if optimizer.persistent_parameters:  # those are whole on every rank all the time
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._stage > 0:
            optimizer.update_lp_params()
        elif optimizer is not self._adamw:
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for low, high in zip(lows, highs, strict=True):
                    low.data.copy_(high.data)


def optimizer_steps(adamw: AdamW) -> int:
    """That it has made; every parameter's count is the same."""
    return max((int(state["step"]) for state in adamw.state.values() if state), default=0)


def set_optimizer_steps(adamw: AdamW, number: int) -> None:
    for state in adamw.state.values():
        if state:
            state["step"].fill_(number)


def _holder(
    piece: Piece, flats: list[tuple[Tensor, dict[str, Any]]]
) -> tuple[Tensor, dict[str, Any], int]:
    """The optimizer's tensor of which a piece is a view, its group, and where in it it begins."""
    address = piece.values.data_ptr()
    for flat, group in flats:
        offset = (address - flat.data_ptr()) // flat.element_size()
        if flat.device == piece.values.device and 0 <= offset < flat.numel():
            return flat, group, offset
    raise RuntimeError(f"DeepSpeed's optimizer does not hold {piece.key}, which this rank owns")


def hand_over(owned: Mapping[str, list[Piece]], group: dist.ProcessGroup) -> None:
    """Each replica has filled its share of the pieces; now all get it from the one that has it."""
    for kind in STATE:
        for other in range(group.size()):
            source = dist.get_global_rank(group, other)
            for piece in share(owned[kind], other, group.size()):
                dist.broadcast(piece.values.view(torch.uint8), source, group)
