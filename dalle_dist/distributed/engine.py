"""A model under DeepSpeed: exact updates and fp32 fragments out. `build.py` makes it.

Private names of DeepSpeed in use: `param._hp_mapping` (ZeRO-1/2, what its universal checkpoints
rest on), `optimizer.fp32_groups` (bf16 without ZeRO), `basic_optimizer`, those of `gradients.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_dist.config import Config
from dalle_dist.distributed.ds_config import accumulation
from dalle_dist.distributed.gradient_path import GradientPath
from dalle_dist.distributed.gradients import owned_gradients, put_together
from dalle_dist.distributed.groups import Groups
from dalle_dist.distributed.launch import Ranks
from dalle_dist.distributed.versions import shards
from dalle_dist.errors import CheckpointError
from dalle_dist.optim.ema import Fragment

FOLDER = "deepspeed"


class Engine:
    """A model under DeepSpeed, of any ZeRO stage, on any number of ranks.

    Per update: `accumulation` times `backward`, then one `step`. Weights and optimizer state are
    shared among `places` ranks, of which this is number `place`; other machines hold replicas.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        config: Config,
        ranks: Ranks,
        path: GradientPath,
        groups: Groups | None = None,
    ) -> None:
        self._engine, self._ranks, self.path = deepspeed_engine, ranks, path
        self.config = config
        # Among the ranks that share the weights between them: all, or those of this machine.
        self.place, self.places = ranks.rank, ranks.world
        self.machine, self._groups = 0, groups
        if groups is not None:
            self.place, self.places, self.machine = (
                groups.local,
                groups.local_world_size,
                groups.machine,
            )
        self.skipped = False  # whether the last `step` left everything as it was
        self.stage = shards(deepspeed_engine)
        self.accumulation = accumulation(config.train, ranks.world)
        whole_shape = "ds_shape" if self.stage == 3 else "shape"
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(getattr(parameter, whole_shape))
            for name, parameter in self.module.named_parameters()
        }

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's share of the global loss.

        The shares of all micro-batches of all ranks add up to the loss. So DeepSpeed's division by
        the ranks is undone here, and its division by the accumulation steps left out. In fp16 the
        block scales make up for it, and it is undone after the reduction (paper appendix D).
        """
        factor = 1 if self.path.scaling is not None else self._ranks.world
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts

    @torch.no_grad()  # DeepSpeed 0.18.9 gathers weights in place into a tensor of a graph
    def step(self, lr: float, measure: bool = False) -> float:
        """Clip and apply the summed gradient; returns its norm before clipping.

        Where gradients are scaled or compressed, an update may be skipped (`skipped`): then no
        weight and no moment changes. `measure` renews the telemetry of `path`.
        """
        optimizer = self._engine.basic_optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        copies = self._ranks.world // (self.places if self.stage else 1)
        verdict = self.path.prepare(self.gradients, copies, measure)
        if self._groups is not None:
            put_together(self._engine.optimizer, self.gradients(), self._groups.shard)
        self.skipped = optimizer.skip = verdict.skip
        plain = None if self._engine.optimizer is not optimizer else _norm(self)
        with self._kept(verdict.frozen):
            self._engine.step()
        return float(self._engine.get_global_grad_norm() if plain is None else plain)

    def gradients(self) -> list[Fragment]:
        """The reduced fp32 gradients that this rank owns, as views, after the last `backward`."""
        return owned_gradients(self.module, self._engine.optimizer, self.stage, self.place)

    def fragments(self) -> list[Fragment]:
        """The fp32 master weights that this rank owns; a machine's fragments cover each once.

        `values` are views of the live weights.
        """
        if self.stage == 0:
            return self._whole() if self._ranks.rank == 0 else []
        find = _zero3_fragment if self.stage == 3 else _hp_fragment
        found = (find(name, p, self.place) for name, p in self.module.named_parameters())
        return [fragment for fragment in found if fragment is not None]

    @contextmanager
    def sampling_model(self, build: Callable[[], nn.Module]) -> Iterator[nn.Module | None]:
        """On rank 0 a model with the present weights that needs no other rank; None elsewhere.

        Under ZeRO-3 the weights are gathered one by one into a model made by `build`; otherwise it
        is the trained module itself.
        """
        main = self._ranks.rank == 0
        if self.stage < 3:
            self._engine.eval()
            yield self.module if main else None
            self._engine.train()
        else:
            state = self._gather()
            model = build() if main else None
            if model is not None:
                device, dtype = self._ranks.device, next(iter(state.values())).dtype
                model.load_state_dict(state, strict=False)
                model.to(device, dtype).eval()
            yield model
        self._ranks.barrier()

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's state into `folder`/deepspeed; all ranks together.

        Raises what went wrong on this rank, only after all ranks are through: nobody is left
        waiting in DeepSpeed's barriers.

        Raises:
            CheckpointError: on all ranks, when the machines' weights have come apart.
        """
        self._refuse_diverged()
        files = self._engine.checkpoint_engine
        files.error = None
        (folder / FOLDER).mkdir(exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=FOLDER, save_latest=False)
        if files.error is not None:
            raise files.error

    def _refuse_diverged(self) -> None:
        if self._groups is None:
            return
        bits = [f.values.view(torch.int32).sum(dtype=torch.int64) for f in self.fragments()]
        sums = torch.stack(bits or [torch.zeros((), dtype=torch.int64)]).to(self._ranks.device)
        first = sums.clone()
        dist.broadcast(first, dist.get_global_rank(self._groups.replica, 0), self._groups.replica)
        if self._ranks.any(not first.equal(sums)):
            raise CheckpointError(
                "the machines' weights differ, which their all-reduces should make impossible; "
                "resume from the last checkpoint, and look for hardware that is not like the rest"
            )

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, bit for bit. Raises CheckpointError when it does not fit."""
        if not (folder / FOLDER).is_dir():
            raise CheckpointError(f"{folder}: holds no DeepSpeed state ({FOLDER}/ is missing)")
        try:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=FOLDER)
        except (RuntimeError, KeyError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: DeepSpeed cannot load it ({reason})") from error
        if loaded is None:
            raise CheckpointError(f"{folder}: holds no DeepSpeed state ({FOLDER}/)")

    @contextmanager
    def _kept(self, names: frozenset[str]) -> Iterator[None]:
        """Parameters of these names and their moments come out of the optimizer as they went in."""
        if not names:
            yield
            return
        owned = self._whole() if self.stage == 0 else self.fragments()
        pieces = [f.values.detach() for f in owned if f.name in names]
        views = [view for piece in pieces for view in (piece, *self._moments(piece))]
        copies = [view.clone() for view in views]

        def restore(*_: Any) -> None:
            for view, copy in zip(views, copies, strict=True):
                view.copy_(copy)

        handle = self._engine.basic_optimizer.register_step_post_hook(restore)
        try:
            yield
        finally:
            handle.remove()

    def _moments(self, values: Tensor) -> Iterator[Tensor]:
        """The optimizer's state of these weights, a piece of one of the tensors it updates."""
        for flat, state in self._engine.basic_optimizer.state.items():
            if flat.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
                start = values.storage_offset() - flat.storage_offset()
                for moment in state.values():
                    if moment.shape == flat.shape:
                        yield moment.view(-1).narrow(0, start, values.numel())

    def _whole(self) -> list[Fragment]:
        named = list(self.module.named_parameters())
        if self._engine.optimizer is self._engine.basic_optimizer:  # fp32
            return [Fragment(name, 0, p.data.view(-1)) for name, p in named]
        masters = self._engine.optimizer.fp32_groups
        lows = [p for group in self._engine.optimizer.fp16_groups for p in group]
        highs = [p for group in masters for p in group]
        by_id = {id(low): high for low, high in zip(lows, highs, strict=True)}
        return [Fragment(name, 0, by_id[id(p)].data.view(-1)) for name, p in named]

    def _gather(self) -> dict[str, Tensor]:
        import deepspeed

        state = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self._ranks.rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        return state


def _norm(engine: Engine) -> Tensor:
    """DeepSpeed keeps no norm for fp32 without ZeRO; gradients are reduced by now."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _hp_fragment(name: str, parameter: Any, place: int) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().view(-1))


def _zero3_fragment(name: str, parameter: Any, place: int) -> Fragment | None:
    from deepspeed.utils import safe_get_local_fp32_param

    values = safe_get_local_fp32_param(parameter).view(-1)
    # Every rank holds an equal piece, the last ones filled up beyond the parameter's end.
    start = place * parameter.ds_tensor.ds_numel
    numel = min(values.numel(), parameter.ds_numel - start)
    return Fragment(name, start, values[:numel]) if numel > 0 else None
