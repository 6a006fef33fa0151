"""A model put under DeepSpeed as the config says.

Tested with DeepSpeed 0.19.8, 0.18.9 and 0.17.5 (`make test-deepspeed-matrix`). The private names in
use, and what is refused under which version, are in `versions.py`.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from dalle_dist.config import Config
from dalle_dist.distributed.block_scaling import BlockScaling
from dalle_dist.distributed.ds_config import check_together, deepspeed_config
from dalle_dist.distributed.engine import Engine
from dalle_dist.distributed.gradient_path import GradientPath
from dalle_dist.distributed.groups import Groups, machine_groups
from dalle_dist.distributed.launch import Ranks
from dalle_dist.distributed.node_local import NodeLocal, start_alike
from dalle_dist.distributed.replicas import Replicas
from dalle_dist.distributed.safe_pickle import safe_checkpoint_engine
from dalle_dist.distributed.versions import (
    check_version,
    require,
    require_names,
    shards,
    wait_for_all_gathers,
)
from dalle_dist.optim.adamw import AdamW
from dalle_dist.optim.apex import fused_layer_norm
from dalle_dist.optim.groups import param_groups
from dalle_dist.transformer.blocks import compile_blocks
from dalle_dist.transformer.embeddings import use_layer_norm


def build_engine(model: nn.Module, config: Config, ranks: Ranks) -> Engine:
    """Put `model` under DeepSpeed as the config says; rank 0's weights are taken by all.

    Raises:
        ConfigError: train.deepspeed contradicts the config, sizes do not divide, what
            is asked for does not go together, or this DeepSpeed is known to be wrong.
        RuntimeError: this DeepSpeed lacks a private name that is used here.
    """
    import deepspeed

    between, precision = config.parallel.between_nodes, config.train.precision
    check_version(deepspeed.__version__, precision, config.train.zero_stage, between)
    wait_for_all_gathers(deepspeed.__version__, ranks.device.type)
    _quieten()
    tree = deepspeed_config(config.train, ranks.world)
    check_together(config, tree)
    groups = None
    if between != "zero":
        groups = machine_groups(ranks, config.parallel.local_world_size or None)
        tree["train_batch_size"] //= groups.machines  # DeepSpeed knows of one
        start_alike(model, ranks)
    path = _path(model, config, ranks, groups)
    optimizer = _optimizer(model, config)
    if config.train.optimizer == "apex":
        use_layer_norm(model, fused_layer_norm())
    if config.train.compile:
        compile_blocks(model)
    engine = _initialize(model, optimizer, tree, config, ranks, groups)
    return Engine(engine, config, ranks, path, groups)


def _path(model: nn.Module, config: Config, ranks: Ranks, groups: Groups | None) -> GradientPath:
    scaling, replicas = None, None
    if config.train.precision == "fp16":
        scaling = BlockScaling(model, ranks)
        _mark(model, scaling.matrices)
        # cuBLAS may else add up parts of a long sum in fp16.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if groups is not None:
        cut = config.train.zero_stage == 3
        replicas = Replicas(model, config.parallel, groups, ranks, config.seed, cut)
    return GradientPath(model, config.train.skip, scaling, replicas)


def _optimizer(model: nn.Module, config: Config) -> AdamW:
    train = config.train
    return AdamW(
        param_groups(model, train.weight_decay, train.moments),
        # Some of DeepSpeed's wrappers step once on zero gradients: that must not move a weight.
        lr=0.0,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        variance_clip=train.variance_clip,
        implementation=train.optimizer,
    )


def _initialize(
    model: nn.Module,
    optimizer: AdamW,
    tree: dict[str, Any],
    config: Config,
    ranks: Ranks,
    groups: Groups | None,
) -> Any:
    import deepspeed
    from deepspeed.utils import groups as deepspeed_groups

    mpu = None if groups is None else NodeLocal(groups, ranks)
    require(deepspeed_groups, "groups", "mpu")
    deepspeed_groups.mpu = None  # that of an earlier engine in this process
    deepspeed.init_distributed(dist_init_required=False)  # else ZeRO-3 takes the world for one
    if tree["zero_optimization"].get("stage") == 3:
        # Weight by weight from the host to shards on the devices: whole, it may fit none of them.
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        deepspeed.zero.Init(
            module=model.to(dtype),
            data_parallel_group=None if groups is None else groups.shard,
            config_dict_or_path=tree,
            dtype=dtype,
            mpu=mpu,
        )
    else:
        model.to(ranks.device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=tree, mpu=mpu, dist_init_required=False
    )
    require_names(engine, shards(engine), config.train.precision == "fp16")
    for state in engine.basic_optimizer.state.values():
        state["step"].zero_()
    # With its autocast comes a scaler of its own, which would scale the loss behind our back.
    engine.optimizer.torch_autocast_gradscaler = None
    engine.checkpoint_engine = safe_checkpoint_engine()
    # The script holds nothing that convert needs, and its writing could fail on rank 0 alone.
    engine._copy_recovery_script = lambda path: None
    if groups is not None and groups.machine > 0:
        # Every machine would write the same files.
        engine.save_zero_checkpoint = engine.save_non_zero_checkpoint = False
    return engine


def _quieten() -> None:
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    # A C++ extension for CPU collectives that DeepSpeed would compile at the first start: a minute
    # and a compiler for what gloo does as well.
    compatible_ops["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_of_interest)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        # DeepSpeed's to mend: it calls what torch has renamed.
        warnings.filterwarnings("ignore", f".*{name}.* is deprecated", FutureWarning)


def _of_interest(record: logging.LogRecord) -> bool:
    """Not that the optimizer is ours: it is tested here."""
    return "untested optimizer" not in record.getMessage()


def _mark(model: nn.Module, names: frozenset[str]) -> None:
    """Have DeepSpeed gather and reduce these parameters in fp16."""
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

    for name, parameter in model.named_parameters():
        if name in names:
            setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.float16)
