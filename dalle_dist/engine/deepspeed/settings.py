"""DeepSpeed's JSON: ZeRO matters are the file's, all else our config's; they may not disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dalle_dist.config import Config, TrainConfig
from dalle_dist.distributed import shipped
from dalle_dist.errors import ConfigError

# `scheduler` has no equal in our config: a plateau schedule cannot be said in DeepSpeed's terms.
_FOREIGN = {
    "scheduler": "the schedule is set by train.lr, train.warmup and train.halve_at",
    "amp": "precision is set by train.precision",
    "torch_autocast": "precision is set by train.precision",
}
# fp16 takes DeepSpeed's route for parameters of two kinds: it gathers and reduces in fp16 those
# that the engine marks, and all others in fp32. The model turns the autocast itself off.
_AUTOCAST: dict[bool, dict[str, tuple[str, Any]]] = {
    False: {},
    True: {
        "torch_autocast.enabled": ("train.precision", True),
        "torch_autocast.dtype": ("train.precision", "float16"),
        "torch_autocast.lower_precision_safe_modules": ("train.precision", []),
    },
}
_OPTIMIZER = {
    "lr": "lr",
    "eps": "eps",
    "weight_decay": "weight_decay",
}


def accumulation(config: TrainConfig, world: int) -> int:
    """Micro-batches of one update on each rank. Raises ConfigError when it is not whole."""
    steps, rest = divmod(config.batch_size, config.micro_batch * world)
    if rest or not steps:
        raise ConfigError(
            f"train.batch_size: {config.batch_size} is not a multiple of train.micro_batch "
            f"{config.micro_batch} x {world} ranks = {config.micro_batch * world}"
        )
    return steps


def deepspeed_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """The file at train.deepspeed with our values filled in.

    Raises:
        ConfigError: no such file, not JSON, or a value that contradicts our config.
    """
    tree = read(config.deepspeed)
    for section, mend in _FOREIGN.items():
        if tree.get(section) and _enabled(tree[section]):
            raise ConfigError(f"{config.deepspeed}: remove '{section}': {mend}")
        tree.pop(section, None)
    if config.precision == "fp16" and _enabled(tree.get("fp16") or {"enabled": False}):
        raise ConfigError(
            f"{config.deepspeed}: remove 'fp16': train.precision=fp16 has scales of its own, one "
            "per resblock"
        )
    _check_optimizer(config, tree.pop("optimizer", None))
    for key, (option, value) in _ours(config, world).items():
        _merge(config.deepspeed, tree, key, option, value)
    zero = tree.setdefault("zero_optimization", {})
    if stage(config) not in range(4):
        raise ConfigError(f"{config.deepspeed}: zero_optimization.stage {stage(config)} is not 0-3")
    if "offload_optimizer" in zero:
        tree.setdefault("zero_force_ds_cpu_optimizer", False)
    if config.precision == "bf16" and zero.get("stage", 0) > 0:
        # Micro-batches are summed in fp32: a bf16 sum drops what is below 1/256 of it.
        tree.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    tree.setdefault("steps_per_print", 2**62)
    tree["zero_allow_untested_optimizer"] = True  # ours; it is tested here
    return tree


def check_together(config: Config, tree: dict[str, Any]) -> None:
    """Raises ConfigError when what `deepspeed_config` gave cannot do what the config asks for."""
    zero, between = tree["zero_optimization"], config.parallel.between_nodes
    file = config.train.deepspeed
    if between != "zero" and zero.get("stage", 0) == 0:
        raise ConfigError(
            f"parallel.between_nodes: {between} needs ZeRO 1, 2 or 3, but {file} has stage 0"
        )
    summed = tree.get("data_types", {}).get("grad_accum_dtype") or "fp32"
    if between != "zero" and summed != "fp32":
        raise ConfigError(
            f"{file}: remove data_types.grad_accum_dtype ({summed}): averaging between machines "
            "wants gradients in fp32"
        )
    if (between != "zero" or config.train.precision == "fp16") and "offload_optimizer" in zero:
        raise ConfigError(
            f"{file}: remove zero_optimization.offload_optimizer: neither fp16 nor averaging "
            "between machines finds gradients that DeepSpeed moves to the host"
        )


def stage(config: TrainConfig) -> int:
    """ZeRO stage of the file at train.deepspeed."""
    return int(read(config.deepspeed).get("zero_optimization", {}).get("stage", 0))


def read(path: str) -> dict[str, Any]:
    """The JSON at `path`, relative to the working folder or else to the shipped files."""
    file = shipped.find(path)
    if file is None:
        names = ", ".join(f"ds_configs/{name}" for name in shipped.names("ds_configs"))
        raise ConfigError(
            f"train.deepspeed: no file '{path}' in {Path.cwd()} or {shipped.root()}; "
            f"shipped: {names}"
        )
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"train.deepspeed: {path} is not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"train.deepspeed: {path} is not a JSON object")
    return tree


def _ours(config: TrainConfig, world: int) -> dict[str, tuple[str, Any]]:
    return {
        "train_batch_size": ("train.batch_size", config.batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", config.micro_batch),
        "gradient_accumulation_steps": (
            "train.batch_size / (train.micro_batch x ranks)",
            accumulation(config, world),
        ),
        "gradient_clipping": ("train.clip", config.clip),
        "bf16.enabled": ("train.precision", config.precision == "bf16"),
        "fp16.enabled": ("train.precision", False),
        **_AUTOCAST[config.precision == "fp16" and stage(config) > 0],
    }


def _merge(file: str, tree: dict[str, Any], key: str, option: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: {parent} is {json.dumps(tree)}, not a section with keys")
    _require_equal(file, key, tree.get(leaf, value), option, value)
    tree[leaf] = value


def _check_optimizer(config: TrainConfig, section: dict[str, Any] | None) -> None:
    if section is None:
        return
    file = config.deepspeed
    _require_equal(file, "optimizer.type", section.get("type", "AdamW"), "the optimizer", "AdamW")
    wanted = {key: getattr(config, name) for key, name in _OPTIMIZER.items()}
    wanted["betas"] = [config.beta1, config.beta2]
    for key, value in section.get("params", {}).items():
        if key not in wanted:
            raise ConfigError(f"{file}: remove 'optimizer.params.{key}': the optimizer is ours")
        option = f"train.{_OPTIMIZER.get(key, 'beta1, train.beta2')}"
        _require_equal(file, f"optimizer.params.{key}", value, option, wanted[key])


def _require_equal(file: str, key: str, found: Any, option: str, wanted: Any) -> None:
    if found not in (wanted, "auto"):
        raise ConfigError(
            f"{file}: {key} is {json.dumps(found)}, but {option} is {json.dumps(wanted)}; change "
            "one of them, or remove the key from the JSON"
        )


def _enabled(section: Any) -> bool:
    return bool(section.get("enabled", True)) if isinstance(section, dict) else bool(section)
