"""Which DeepSpeed: the versions tested, those refused, and the private names that are required.

They are used in the other files here, most of them in `owned_pieces.py`: when one changes,
change both.

Assigning to a name that DeepSpeed no longer reads, or asking for one that it no longer sets, would
give wrong updates in silence. So each is asked for once, when the engine is built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from dalle_dist.engine.deepspeed.nvme import swapped
from dalle_dist.errors import ConfigError

# By `make test-deepspeed-matrix`, each in all that it is not refused for.
TESTED = ("0.19.8", "0.18.9", "0.17.5")

Version = tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """What is wrong with the versions from `first` to `last`, in the given cases or in all."""

    first: Version
    last: Version
    what: str
    precision: str | None = None
    stage: int | None = None
    only_between_nodes: bool = False


FAULTS = (
    Fault((0, 0, 0), (0, 17, 4), "is older than what is tested"),
    # DeepSpeed #7665.
    Fault((0, 17, 6), (0, 18, 2), "keeps only the last micro-batch's gradient under ZeRO-2"),
    # It divides by the accumulation steps although told not to (`scale_wrt_gas=False`).
    Fault((0, 18, 3), (0, 18, 3), "makes accumulated gradients too small"),
    # Up to 0.18.4 nothing is sharded; later norms are 0.178 instead of 0.140.
    Fault((0, 18, 0), (0, 18, 9), "does not do ZeRO-1 in bf16", "bf16", 1),
    Fault(
        (0, 17, 5), (0, 19, 7), "has no fp32 gradients of bf16 under ZeRO-2 to average between "
        "nodes", "bf16", 2, only_between_nodes=True,
    ),
    Fault((0, 17, 5), (0, 17, 5), "cannot reduce a model's parameters in two dtypes", "fp16"),
)  # fmt: skip
_WAITS_FOR_ALL: Version = (0, 19, 8)
ANY_VERSION = "DALLE_DIST_ANY_DEEPSPEED"  # set to 1, it lets newer versions than tested in


def check_version(version: str, precision: str, stage: int, between: str) -> None:
    """Refuse a DeepSpeed that is known to be wrong for what is asked of it.

    Args:
        stage: of ZeRO.
        between: parallel.between_nodes.

    Raises:
        ConfigError: naming the fault and what to install.
    """
    for fault in FAULTS:
        if (
            fault.first <= _number(version) <= fault.last
            and fault.precision in (None, precision)
            and fault.stage in (None, stage)
            and not (fault.only_between_nodes and between == "zero")
        ):
            raise ConfigError(f"DeepSpeed {version} {fault.what}; install {TESTED[0]}")
    if _number(version) > _number(TESTED[0]) and os.environ.get(ANY_VERSION) != "1":
        raise ConfigError(
            f"DeepSpeed {version} is newer than what is tested; install {TESTED[0]}, or set "
            f"{ANY_VERSION}=1, then a step whose result is known is all that is compared"
        )


def require(owner: Any, what: str, *names: str) -> None:
    """Raises RuntimeError when `owner`, which is DeepSpeed's `what`, lacks one of `names`."""
    import deepspeed

    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} has no {what}.{name}, which dalle-dist rests "
                f"on; install one it is tested with: {', '.join(TESTED)}"
            )


def require_names(engine: Any, stage: int, scaled: bool) -> None:
    """Raises RuntimeError when a fresh DeepSpeed engine lacks a private name that is used here.

    Args:
        stage: of ZeRO, as it shards the optimizer.
        scaled: whether resblocks have scales, so that DeepSpeed's own scaler must be silenced.
    """
    require(engine, "engine", "basic_optimizer")
    optimizer = engine.optimizer
    if scaled and stage > 0:
        require(optimizer, "optimizer", "torch_autocast_gradscaler")
    if keeps_whole_gradients(optimizer):
        require(optimizer, "optimizer", "bf16_groups", "fp32_groups_gradients",
                "fp32_groups_gradients_flat")  # fmt: skip
    elif stage > 0:
        require(optimizer, "optimizer", "averaged_gradients")
    elif optimizer is not engine.basic_optimizer:
        require(optimizer, "optimizer", "fp32_groups", "fp16_groups")
    if stage == 3:
        require(optimizer, "optimizer", "fp16_groups", "persistent_parameters",
                "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat",
                "sub_group_to_group_id", "partition_grads", "flatten",
                "_reassign_or_swap_out_partitioned_parameters",
                "_swappable_optimizer_subgroup")  # fmt: skip
        if swapped(optimizer):
            _require_swapper(optimizer)
    elif stage > 0:
        require(optimizer, "optimizer", "update_lp_params")
    for parameter in engine.module.parameters():
        if stage == 3:
            require(parameter, "parameter", "ds_tensor", "ds_numel", "ds_shape")
            require(parameter.ds_tensor, "parameter.ds_tensor", "ds_numel")
        elif stage > 0:
            require(parameter, "parameter", "_hp_mapping")
            if parameter._hp_mapping is not None:
                _require_mapping(parameter)


def shards(engine: Any) -> int:
    """The ZeRO stage that a DeepSpeed engine works in: 0 where every rank has all optimizer state.

    Up to 0.17 bf16 without ZeRO is ZeRO-1 all the same.
    """
    stage = int(engine.zero_optimization_stage())
    return max(stage, 1) if keeps_whole_gradients(engine.optimizer) else stage


def keeps_whole_gradients(optimizer: Any) -> bool:
    """Whether every rank keeps the gradient of what others own: bf16 under ZeRO-1."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return isinstance(optimizer, BF16_Optimizer)


def wait_for_all_gathers(version: str, device: str) -> None:
    """Before 0.19.8 ZeRO-3 launches several all-gathers and waits for the last alone.

    That is enough on CUDA streams. gloo's end each in its own time: weights were read before they
    had arrived, in about every tenth run of a few steps. Here each is waited for at its launch.
    """
    from deepspeed import comm

    gather = comm.all_gather_into_tensor
    if device != "cpu" or _number(version) >= _WAITS_FOR_ALL or hasattr(gather, "waits"):
        return

    def gather_and_wait(*args: Any, **kwargs: Any) -> Any:
        work = gather(*args, **kwargs)
        if work is not None:
            work.wait()
        return work

    gather_and_wait.waits = True  # type: ignore[attr-defined]
    comm.all_gather_into_tensor = gather_and_wait


def _require_swapper(optimizer: Any) -> None:
    require(optimizer, "optimizer", "grad_position", "optimizer_swapper",
            "fp16_partitioned_groups_flat_numel")  # fmt: skip
    require(optimizer.optimizer_swapper, "optimizer_swapper", "swap_folder",
            "swap_in_optimizer_state", "swap_out_optimizer_state",
            "release_swap_buffers")  # fmt: skip


def _require_mapping(parameter: Any) -> None:
    require(parameter, "parameter", "_index_in_param_group")
    require(parameter._hp_mapping, "parameter._hp_mapping",
            "lp_fragment_address", "get_hp_fragment", "get_lp_grad_fragment")  # fmt: skip


def _number(version: str) -> Version:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3])
