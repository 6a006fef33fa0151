"""DeepSpeed's config: what our config names is ours, all else the section's `deepspeed` keys."""

from __future__ import annotations

import copy
import json
from typing import Any

from dalle_dist.config import ParallelConfig, StageConfig
from dalle_dist.engine.deepspeed.nvme_settings import check_nvme
from dalle_dist.errors import ConfigError

# `scheduler` has no equal in our config: a plateau schedule cannot be said in DeepSpeed's terms.
_FOREIGN = {
    "scheduler": "the schedule is set by {0}.lr, {0}.warmup and the keys beside them",
    "amp": "precision is set by {0}.precision",
    "torch_autocast": "precision is set by {0}.precision",
}
# fp16 takes DeepSpeed's route for parameters of two kinds: it gathers and reduces in fp16 those
# that the engine marks, and all others in fp32. The model turns the autocast itself off.
_AUTOCAST: dict[str, Any] = {
    "torch_autocast.enabled": True,
    "torch_autocast.dtype": "float16",
    "torch_autocast.lower_precision_safe_modules": [],
}
_OPTIMIZER = ("lr", "eps", "weight_decay")


def micro_batch(stage: StageConfig, world: int) -> int:
    """Samples of a rank's backward pass. Raises ConfigError when batch_size cannot be split."""
    name, batch = stage.section, stage.batch_size
    if stage.micro_batch:
        return stage.micro_batch
    if batch % world:
        raise ConfigError(f"{name}.batch_size: {batch} is not a multiple of {world} ranks")
    return batch // world


def accumulation(stage: StageConfig, world: int) -> int:
    """Micro-batches of one step on each rank. Raises ConfigError when it is not whole."""
    name, micro = stage.section, micro_batch(stage, world)
    count, rest = divmod(stage.batch_size, micro * world)
    if rest or not count:
        raise ConfigError(
            f"{name}.batch_size: {stage.batch_size} is not a multiple of {name}.micro_batch "
            f"{micro} x {world} ranks = {micro * world}"
        )
    return count


def deepspeed_config(stage: StageConfig, world: int) -> dict[str, Any]:
    """The keys of the section's `deepspeed` with our values filled in.

    Raises:
        ConfigError: one of them contradicts our config, or the batch cannot be split.
        ValueError: the precision is still "auto".
    """
    if stage.precision == "auto":
        raise ValueError(f"{stage.section}.precision: auto must be decided before DeepSpeed starts")
    file, tree = f"{stage.section}.deepspeed", copy.deepcopy(stage.deepspeed)
    _refuse_foreign(stage, file, tree)
    _check_optimizer(stage, file, tree)
    check_nvme(stage, tree)
    tree.pop("optimizer", None)
    for key, (option, value) in _ours(stage, world).items():
        _merge(file, tree, key, option, value)
    if stage.zero_stage == 3:
        # Small parameters that stay whole on every rank are gathered one by one after each step,
        # 12 collectives a layer; sharded, they come with the layer.
        tree["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
        # A copy of each gradient to a bucket, which is copied once more before it is sent.
        tree["zero_optimization"].setdefault("contiguous_gradients", False)
    if "offload_optimizer" in tree["zero_optimization"]:
        tree.setdefault("zero_force_ds_cpu_optimizer", False)
    if stage.precision == "bf16" and stage.zero_stage > 0:
        # Micro-batches are summed in fp32: a bf16 sum drops what is below 1/256 of it.
        _section(file, tree, "data_types").setdefault("grad_accum_dtype", "fp32")
    tree.setdefault("steps_per_print", 2**62)
    tree["zero_allow_untested_optimizer"] = True  # ours; it is tested here
    return tree


def check_together(stage: StageConfig, parallel: ParallelConfig, tree: dict[str, Any]) -> None:
    """Raises ConfigError when what `deepspeed_config` gave cannot do what the config asks for."""
    between, zero = parallel.between_nodes, tree["zero_optimization"]
    if between != "zero" and stage.zero_stage == 0:
        raise ConfigError(
            f"parallel.between_nodes: {between} needs {stage.section}.zero_stage 1, 2 or 3, but it "
            "is 0"
        )
    summed = tree.get("data_types", {}).get("grad_accum_dtype") or "fp32"
    if between != "zero" and summed != "fp32":
        raise ConfigError(
            f"{stage.section}.deepspeed: remove data_types.grad_accum_dtype ({summed}): averaging "
            "between nodes needs gradients in fp32"
        )
    if (between != "zero" or stage.precision == "fp16") and "offload_optimizer" in zero:
        raise ConfigError(
            f"{stage.section}.deepspeed: remove zero_optimization.offload_optimizer: neither fp16 "
            "nor averaging between nodes finds gradients that DeepSpeed moves to the host"
        )


def _ours(stage: StageConfig, world: int) -> dict[str, tuple[str, Any]]:
    """Our value of each of DeepSpeed's keys, and the key of our config that it comes from."""
    name = stage.section
    autocast = _AUTOCAST if stage.precision == "fp16" and stage.zero_stage > 0 else {}
    return {
        "train_batch_size": (f"{name}.batch_size", stage.batch_size),
        "train_micro_batch_size_per_gpu": (f"{name}.micro_batch", micro_batch(stage, world)),
        "gradient_accumulation_steps": (
            f"{name}.batch_size / ({name}.micro_batch x ranks)",
            accumulation(stage, world),
        ),
        "gradient_clipping": (f"{name}.clip", stage.clip),
        "bf16.enabled": (f"{name}.precision", stage.precision == "bf16"),
        "fp16.enabled": (f"{name}.precision", False),
        "zero_optimization.stage": (f"{name}.zero_stage", stage.zero_stage),
        **{key: (f"{name}.precision", value) for key, value in autocast.items()},
    }


def _refuse_foreign(stage: StageConfig, file: str, tree: dict[str, Any]) -> None:
    for section, fix in _FOREIGN.items():
        if tree.get(section) and _enabled(tree[section]):
            raise ConfigError(f"{file}: remove '{section}': {fix.format(stage.section)}")
        tree.pop(section, None)
    if stage.precision == "fp16" and _enabled(tree.get("fp16") or {"enabled": False}):
        raise ConfigError(
            f"{file}: remove 'fp16': {stage.section}.precision=fp16 has scales of its own, one per "
            "resblock"
        )


def _merge(file: str, tree: dict[str, Any], key: str, option: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = _section(file, tree, parent)
    _require_equal(file, key, tree.get(leaf, value), option, value)
    tree[leaf] = value


def _section(file: str, tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The section of this name, made if it is absent. Raises ConfigError: it is something else."""
    found = tree.setdefault(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: {name} is {json.dumps(found)}, not a section with keys")
    return found


def _check_optimizer(stage: StageConfig, file: str, tree: dict[str, Any]) -> None:
    if "optimizer" not in tree:
        return
    section = _section(file, tree, "optimizer")
    _require_equal(file, "optimizer.type", section.get("type", "AdamW"), "the optimizer", "AdamW")
    name = stage.section
    wanted = {key: (f"{name}.{key}", getattr(stage, key)) for key in _OPTIMIZER}
    wanted["betas"] = (f"{name}.beta1, {name}.beta2", [stage.beta1, stage.beta2])
    for key, value in _section(file, section, "params").items():
        if key not in wanted:
            raise ConfigError(f"{file}: remove 'optimizer.params.{key}': the optimizer is ours")
        _require_equal(file, f"optimizer.params.{key}", value, *wanted[key])


def _require_equal(file: str, key: str, found: Any, option: str, wanted: Any) -> None:
    if found not in (wanted, "auto"):
        raise ConfigError(
            f"{file}: {key} is {json.dumps(found)}, but {option} is {json.dumps(wanted)}; change "
            f"one of them, or remove the key from {file}"
        )


def _enabled(section: Any) -> bool:
    return bool(section.get("enabled", True)) if isinstance(section, dict) else bool(section)
