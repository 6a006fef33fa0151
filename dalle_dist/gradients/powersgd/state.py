"""What PowerSGD keeps from step to step: error buffers and Q's; how they are saved and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.choices import ErrorDtype
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.gradients.all_reduce import launch_mean
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.error_feedback import ErrorBuffer, error_buffer
from dalle_dist.gradients.powersgd.orthogonal import gaussian_RN
from dalle_dist.gradients.powersgd.rank import check_rank


class PowerSGDState:
    """Error buffers and transposed Q's by the key of their shard."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int | None,
        seed: int,
        error_dtype: ErrorDtype,
        warm_start: bool,
    ) -> None:
        self.step = 0
        self.errors: dict[str, ErrorBuffer] = {}
        self.q_by_key: dict[str, Tensor] = {}
        self._group, self._rank, self._seed = group, rank, seed
        self._error_dtype, self._warm_start = error_dtype, warm_start
        # A loaded state is taken over when its shards are first seen.
        self._loaded: Mapping[str, Any] | None = None

    def allocate(self, shards: Sequence[Piece]) -> None:
        """Make Q and error buffer of shards seen for the first time; check that replicas agree.

        Raises:
            ConfigError: rank too large, or shards or Q's differ between replicas.
            CheckpointError: the loaded state lacks one of them or holds others.
        """
        if self._loaded is not None:
            _check_keys(self._loaded["errors"], [shard.key for shard in shards])
        new = [shard for shard in shards if shard.key not in self.errors]
        if new:
            facts = {}
            for shard in new:
                q_RN = self._q(shard)
                facts[f"{shard.key} {tuple(shard.values.shape)}"] = _digest(q_RN)
                self.q_by_key[shard.key] = q_RN.to(shard.values.device)
                self.errors[shard.key] = self._error(shard)
            check_same(facts, self._group)
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """See `PowerSGD.state_dict`."""
        if self._loaded is not None:
            return dict(self._loaded)
        errors = {}
        for key, buffer in self.errors.items():
            error = buffer.read()
            mean = launch_mean(error.reshape(-1).clone(), self._group).wait()
            errors[key] = mean.view(error.shape).cpu()
        warm = {key: q.cpu() for key, q in self.q_by_key.items()} if self._warm_start else {}
        return {"step": self.step, "seed": self._seed, "errors": errors, "q_by_key": warm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `PowerSGD.load_state_dict`."""
        self.step, self._seed = int(state["step"]), int(state["seed"])
        unused = self.step == 0 and not state["errors"]  # saved before the first `reduce`
        self.errors, self.q_by_key, self._loaded = {}, {}, None if unused else state

    def _q(self, shard: Piece) -> Tensor:
        short, long = sorted(shard.values.shape)
        if self._rank is not None:
            check_rank(shard.key, tuple(shard.values.shape), self._rank)
        rank = self._rank or short
        saved = self._loaded["q_by_key"].get(shard.key) if self._loaded is not None else None
        if self._warm_start and saved is not None and saved.shape == (rank, long):
            return torch.as_tensor(saved)
        return gaussian_RN(self._seed, shard.key, rank, long)

    def _error(self, shard: Piece) -> ErrorBuffer:
        buffer = error_buffer(self._error_dtype, like=shard.values)
        if self._loaded is not None:
            error = self._loaded["errors"][shard.key]
            if error.shape != shard.values.shape:
                raise CheckpointError(
                    f"PowerSGD's error of {shard.key} is {tuple(error.shape)}, the shard is "
                    f"{tuple(shard.values.shape)}; resume with as many ranks per node"
                )
            buffer.write(error)
        return buffer


def check_same(facts: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Raises ConfigError on all ranks of `group` unless they hold the same shards and Q's."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, list(facts.items()), group=group)
    for node, other in enumerate(found):
        if [name for name, _ in other] != [name for name, _ in found[0]]:
            raise ConfigError(
                f"PowerSGD: nodes 0 and {node} hold different shards, or in another order; "
                "start all with the same model and ranks per node"
            )
        for (name, digest), (_, first) in zip(other, found[0], strict=True):
            if digest != first:
                raise ConfigError(
                    f"PowerSGD: Q of {name} differs between nodes 0 and {node}; give all the "
                    "same seed and the same version of torch"
                )


def _check_keys(saved: Iterable[str], wanted: Iterable[str]) -> None:
    different = sorted(set(saved) ^ set(wanted))
    if different:
        raise CheckpointError(
            f"PowerSGD's state fits other shards than these ({different[0]} is only in one of "
            "both): resume with the same model, rank and ranks per node as saved it"
        )


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
