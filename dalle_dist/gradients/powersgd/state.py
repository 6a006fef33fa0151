"""What PowerSGD keeps from step to step: error buffers and Q's; how they are saved and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.gradients.all_reduce import launch_mean
from dalle_dist.gradients.batches import Batch, Kind
from dalle_dist.gradients.powersgd.error_feedback import ErrorBuffer, error_buffer
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.powersgd.orthogonal import gaussian_RN
from dalle_dist.gradients.powersgd.rank import check_rank


@dataclass
class Memory:
    """Of one batch, from step to step: what was left out, and Q transposed."""

    keys: tuple[str, ...]
    error: ErrorBuffer
    q_BRN: Tensor


class PowerSGDState:
    """Error buffers and Q's, by batch; in checkpoints by the key of their shard."""

    def __init__(
        self, group: dist.ProcessGroup, rank: int | None, seed: int, options: PowerSGDOptions
    ) -> None:
        self.step = 0
        self._memories: dict[tuple[str, ...], Memory] = {}
        self._group, self._rank, self._seed = group, rank, seed
        self._options = options
        # A loaded state is taken over when its shards are first seen.
        self._loaded: Mapping[str, Any] | None = None

    def of(self, batch: Batch) -> Memory:
        """What was allocated for this batch."""
        return self._memories[batch.kind.keys]

    def allocate(self, batches: Sequence[Batch]) -> None:
        """Make Q and error buffer of batches seen for the first time; check that replicas agree.

        Raises:
            ConfigError: rank too large, or shards or Q's differ between replicas.
            CheckpointError: the loaded state lacks one of them or holds others.
        """
        kinds = [batch.kind for batch in batches]
        if self._loaded is not None:
            _check_keys(self._loaded["errors"], [key for kind in kinds for key in kind.keys])
        new = [kind for kind in kinds if kind.keys not in self._memories]
        if new:
            facts = {}
            for kind in new:
                qs = [self._q(key, kind.shape) for key in kind.keys]
                for key, q_RN in zip(kind.keys, qs, strict=True):
                    facts[f"{key} {tuple(kind.shape)}"] = _digest(q_RN)
                q_BRN = torch.stack(qs).to(kind.slot_B.device)
                self._memories[kind.keys] = Memory(kind.keys, self._error(kind), q_BRN)
            check_same(facts, self._group)
        self._loaded = None

    def errors(self) -> dict[str, Tensor]:
        """By key, fp32; not to be written to."""
        return dict(self._errors())

    def state_dict(self) -> dict[str, Any]:
        """See `PowerSGD.state_dict`."""
        if self._loaded is not None:
            return dict(self._loaded)
        errors = {}
        for key, error in self._errors():
            mean = launch_mean(error.reshape(-1).clone(), self._group).wait()
            errors[key] = mean.view(error.shape).cpu()
        qs: dict[str, Tensor] = {}
        if self._options.q_changes:
            for memory in self._memories.values():
                qs |= dict(zip(memory.keys, memory.q_BRN.cpu(), strict=True))
        return {"step": self.step, "seed": self._seed, "errors": errors, "q_by_key": qs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `PowerSGD.load_state_dict`."""
        self.step, self._seed = int(state["step"]), int(state["seed"])
        unused = self.step == 0 and not state["errors"]  # saved before the first `reduce`
        self._memories, self._loaded = {}, None if unused else state

    def _errors(self) -> Iterator[tuple[str, Tensor]]:
        for memory in self._memories.values():
            for row, key in enumerate(memory.keys):
                yield key, memory.error.read(row)

    def _q(self, key: str, shape: torch.Size) -> Tensor:
        short, long = sorted(shape)
        if self._rank is not None:
            check_rank(key, tuple(shape), self._rank)
        rank = self._rank or short
        saved = self._loaded["q_by_key"].get(key) if self._loaded is not None else None
        if self._options.q_changes and saved is not None and saved.shape == (rank, long):
            return torch.as_tensor(saved)
        return gaussian_RN(self._seed, key, rank, long)

    def _error(self, kind: Kind) -> ErrorBuffer:
        shape = (len(kind.keys), *kind.shape)
        buffer = error_buffer(self._options.error_dtype, shape, kind.slot_B.device)
        if self._loaded is not None:
            for row, key in enumerate(kind.keys):
                error = self._loaded["errors"][key]
                if error.shape != kind.shape:
                    raise CheckpointError(
                        f"PowerSGD's error of {key} is {tuple(error.shape)}, the shard is "
                        f"{tuple(kind.shape)}; resume with as many ranks per node"
                    )
                buffer.write(row, error)
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
