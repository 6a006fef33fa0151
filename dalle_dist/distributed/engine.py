"""The one file that speaks to DeepSpeed: a model in, exact updates and fp32 fragments out.

Tested with DeepSpeed 0.19.8. Private names in use: `param._hp_mapping` (ZeRO-1/2, what DeepSpeed's
universal checkpoints rest on), `optimizer.fp32_groups` (bf16 without ZeRO), `checkpoint_engine`,
`basic_optimizer`, `torch_autocast_gradscaler`, and those of `gradients.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_dist.config import Config
from dalle_dist.distributed.block_scaling import BlockScaling
from dalle_dist.distributed.ds_config import accumulation, deepspeed_config
from dalle_dist.distributed.gradients import owned_gradients
from dalle_dist.distributed.launch import Ranks
from dalle_dist.distributed.safe_pickle import safe_checkpoint_engine
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.optim.adamw import AdamW
from dalle_dist.optim.apex import fused_layer_norm
from dalle_dist.optim.ema import Fragment
from dalle_dist.optim.groups import param_groups
from dalle_dist.transformer.blocks import compile_blocks
from dalle_dist.transformer.embeddings import use_layer_norm

FOLDER = "deepspeed"
# These sum only the last micro-batch into ZeRO-2's gradient (fixed by DeepSpeed #7665).
_LOSES_MICRO_BATCHES = ((0, 17, 6), (0, 18, 2))


class Engine:
    """A model under DeepSpeed, of any ZeRO stage, on any number of ranks.

    Per update: `accumulation` times `backward`, then one `step`.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        config: Config,
        ranks: Ranks,
        scaling: BlockScaling | None = None,
    ) -> None:
        self._engine = deepspeed_engine
        self._ranks = ranks
        self.scaling = scaling
        self.skipped = False  # whether the last `step` left everything as it was
        self.stage = int(deepspeed_engine.zero_optimization_stage())
        self.accumulation = accumulation(config.train, ranks.world)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
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
        factor = 1 if self.scaling is not None else self._ranks.world
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts

    def step(self, lr: float, measure: bool = False) -> float:
        """Clip and apply the summed gradient; returns its norm before clipping.

        In fp16 an update may be skipped (`skipped`): then no weight and no moment changes.
        `measure` renews the telemetry of `scaling`.
        """
        optimizer, frozen = self._engine.basic_optimizer, frozenset[str]()
        for group in optimizer.param_groups:
            group["lr"] = lr
        if self.scaling is not None:
            copies = self._ranks.world if self.stage == 0 else 1
            verdict = self.scaling.unscale(self.gradients(), copies, measure)
            self.skipped = optimizer.skip = verdict.skip
            frozen = verdict.frozen
        plain = None if self._engine.optimizer is not optimizer else _norm(self)
        with self._kept(frozen):
            self._engine.step()
        return float(self._engine.get_global_grad_norm() if plain is None else plain)

    def gradients(self) -> list[Fragment]:
        """The reduced fp32 gradients that this rank owns, as views, after the last `backward`."""
        return owned_gradients(self.module, self._engine.optimizer, self.stage, self._ranks)

    def fragments(self) -> list[Fragment]:
        """The fp32 master weights that this rank owns; the ranks' fragments cover each weight once.

        `values` are views of the live weights.
        """
        if self.stage == 0:
            return self._whole() if self._ranks.rank == 0 else []
        find = _zero3_fragment if self.stage == 3 else _hp_fragment
        found = (find(name, p, self._ranks) for name, p in self.module.named_parameters())
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
        """
        files = self._engine.checkpoint_engine
        files.error = None
        (folder / FOLDER).mkdir(exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=FOLDER, save_latest=False)
        if files.error is not None:
            raise files.error

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
        masters = getattr(self._engine.optimizer, "fp32_groups", None)
        if masters is None:
            return [Fragment(name, 0, p.data.view(-1)) for name, p in named]
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


def build_engine(model: nn.Module, config: Config, ranks: Ranks) -> Engine:
    """Put `model` under DeepSpeed as config.train says; rank 0's weights are taken by all.

    Raises:
        ConfigError: the JSON at train.deepspeed contradicts the config, sizes do not divide, or
            this DeepSpeed is known to be wrong.
    """
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    _check_version(deepspeed.__version__)
    # A C++ extension for CPU collectives that DeepSpeed would compile at the first start: a minute
    # and a compiler for what gloo does as well.
    compatible_ops["deepspeed_shm_comm"] = False
    tree = deepspeed_config(config.train, ranks.world)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_of_interest)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        # DeepSpeed's to mend: it calls what torch has renamed.
        warnings.filterwarnings("ignore", f".*{name}.* is deprecated", FutureWarning)
    train, scaling = config.train, None
    if train.precision == "fp16":
        scaling = BlockScaling(model, ranks, train.skip)
        _mark(model, scaling.matrices)
    optimizer = AdamW(
        param_groups(model, train.weight_decay, train.moments),
        # Some of DeepSpeed's wrappers step once on zero gradients: that must not move a weight.
        lr=0.0,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        variance_clip=train.variance_clip,
        implementation=train.optimizer,
    )
    if train.optimizer == "apex":
        use_layer_norm(model, fused_layer_norm())
    if train.compile:
        compile_blocks(model)
    if tree["zero_optimization"].get("stage") == 3:
        # Weight by weight from the host to shards on the devices: whole, it may fit none of them.
        deepspeed.init_distributed(dist_init_required=False)  # else it takes the world for one
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        deepspeed.zero.Init(module=model.to(dtype), config_dict_or_path=tree, dtype=dtype)
    else:
        model.to(ranks.device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=tree, dist_init_required=False
    )
    for state in engine.basic_optimizer.state.values():
        state["step"].zero_()
    # With its autocast comes a scaler of its own, which would scale the loss behind our back.
    engine.optimizer.torch_autocast_gradscaler = None
    engine.checkpoint_engine = safe_checkpoint_engine()
    # The script holds nothing that convert needs, and its writing could fail on rank 0 alone.
    engine._copy_recovery_script = lambda path: None
    return Engine(engine, config, ranks, scaling)


def _norm(engine: Engine) -> Tensor:
    """DeepSpeed keeps no norm for fp32 without ZeRO; gradients are reduced by now."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _of_interest(record: logging.LogRecord) -> bool:
    """Not that the optimizer is ours: it is tested here."""
    return "untested optimizer" not in record.getMessage()


def _mark(model: nn.Module, names: frozenset[str]) -> None:
    """Have DeepSpeed gather and reduce these parameters in fp16."""
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

    for name, parameter in model.named_parameters():
        if name in names:
            setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.float16)


def _hp_fragment(name: str, parameter: Any, ranks: Ranks) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().view(-1))


def _zero3_fragment(name: str, parameter: Any, ranks: Ranks) -> Fragment | None:
    from deepspeed.utils import safe_get_local_fp32_param

    values = safe_get_local_fp32_param(parameter).view(-1)
    # Every rank holds an equal piece, the last ones filled up beyond the parameter's end.
    start = ranks.rank * parameter.ds_tensor.ds_numel
    numel = min(values.numel(), parameter.ds_numel - start)
    return Fragment(name, start, values[:numel]) if numel > 0 else None


def _check_version(version: str) -> None:
    first, last = _LOSES_MICRO_BATCHES
    number = tuple(int(part) for part in version.split("+")[0].split(".")[:3])
    if first <= number <= last:
        raise ConfigError(
            f"DeepSpeed {version} loses gradients when it accumulates under ZeRO-2; install "
            "0.18.3 or later"
        )
