"""Put a model under DeepSpeed as the config says.

Tested with DeepSpeed 0.19.8, 0.18.9 and 0.17.5 (`make test-deepspeed-matrix`). The private names in
use, and what is refused under which version, are in `versions.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Container
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dalle_dist.config import ParallelConfig, StageConfig
from dalle_dist.distributed.groups import Groups, node_groups
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.backward_sends import BackwardSends
from dalle_dist.engine.deepspeed.engine import DeepSpeedEngine
from dalle_dist.engine.deepspeed.first_weights import on_meta, sharded_weights, whole_weights
from dalle_dist.engine.deepspeed.half_gather import keep_gathered_in_half
from dalle_dist.engine.deepspeed.node_local import NodeLocal, broadcast_weights
from dalle_dist.engine.deepspeed.nvme_settings import on_nvme, place_on_nvme
from dalle_dist.engine.deepspeed.one_copy import keep_one_copy
from dalle_dist.engine.deepspeed.scatter import scatter_large_ones_apart
from dalle_dist.engine.deepspeed.settings import accumulation, check_together, deepspeed_config
from dalle_dist.engine.deepspeed.versions import (
    check_version,
    require,
    require_names,
    shards,
    wait_for_all_gathers,
)
from dalle_dist.gradients.node_mean import NodeMean
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.powersgd.rank import rank_of_shard
from dalle_dist.gradients.resblocks import Resblocks
from dalle_dist.gradients.scaling import BlockScaling
from dalle_dist.gradients.transform import GradientTransform
from dalle_dist.optim.adamw import AdamW
from dalle_dist.optim.apex import fused_layer_norm
from dalle_dist.optim.outer import OuterSGD
from dalle_dist.optim.param_groups import param_groups
from dalle_dist.precision.scales import BlockScales
from dalle_dist.transformer.blocks import attach_scales, compile_blocks, resblock_map
from dalle_dist.transformer.embeddings import use_layer_norm
from dalle_dist.transformer.initial import Initial
from dalle_dist.transformer.protocol import TextImageTransformer


def build_engine(
    model: nn.Module,
    settings: StageConfig,
    ranks: Ranks,
    *,
    parallel: ParallelConfig | None = None,
    seed: int = 0,
    decayed: Container[str] | None = None,
) -> DeepSpeedEngine:
    """Put `model` under DeepSpeed; rank 0's weights are taken by all.

    Args:
        model: on the host, or on the meta device; then it gets its first weights here, from
            `TextImageTransformer.initials`.
        settings: of the training stage.
        parallel: how nodes work together; None: ZeRO over all ranks.
        seed: of PowerSGD's Gaussian matrices, and of the first weights of a model on the meta
            device.
        decayed: names of the parameters with weight decay; None: the matrices of resblocks (stage
            2: the paper gives the decay and not its targets, B.2; gains, biases and embeddings are
            left alone, as is the custom).

    Raises:
        ConfigError: the DeepSpeed settings contradict the config, sizes do not divide, what is
            asked for does not go together, or this DeepSpeed is known to be wrong.
        RuntimeError: this DeepSpeed lacks a private name that is used here.
    """
    import deepspeed

    parallel = parallel or ParallelConfig()
    check_version(
        deepspeed.__version__, settings.precision, settings.zero_stage, parallel.between_nodes
    )
    wait_for_all_gathers(deepspeed.__version__, ranks.device.type)
    _quieten()
    tree = deepspeed_config(settings, ranks.world)
    check_together(settings, parallel, tree)
    if on_nvme(tree):
        place_on_nvme(tree)
    groups = None
    if parallel.between_nodes != "zero":
        groups = node_groups(ranks, parallel.local_world_size or None)
        tree["train_batch_size"] //= groups.nodes  # DeepSpeed knows of one
        if not on_meta(model):
            broadcast_weights(model, ranks)
    resblocks = resblock_map(model)
    scaling = None if settings.precision != "fp16" else _scaled(model, resblocks, ranks)
    mean, outer = None, None
    if groups is not None and parallel.between_nodes == "diloco":
        outer = _outer(parallel, groups)
    elif groups is not None:
        mean = _node_mean(resblocks, settings, parallel, groups, ranks, seed)
    apart = outer is not None
    transform = GradientTransform(resblocks, ranks, settings.skip, scaling, mean, apart)
    optimizer = _optimizer(model, settings, resblocks.matrices if decayed is None else decayed)
    if settings.adamw_backend == "apex":
        use_layer_norm(model, fused_layer_norm())
    if settings.compile:
        compile_blocks(model)
    engine = _initialize(model, optimizer, tree, settings, ranks, groups, seed)
    early = None
    if mean is not None and parallel.overlap and settings.zero_stage == 3:
        early = _early(engine, resblocks, mean, transform, ranks)
    accumulated = accumulation(settings, ranks.world)
    return DeepSpeedEngine(engine, accumulated, ranks, transform, resblocks, groups, outer, early)


def _early(
    engine: Any,
    resblocks: Resblocks,
    mean: NodeMean,
    transform: GradientTransform,
    ranks: Ranks,
) -> BackwardSends:
    wave_of = {name: mean.waves.of(resblocks.of[name]) for name in resblocks.matrices}
    return BackwardSends(engine.module, engine.optimizer, wave_of, transform.send, ranks.device)


def _scaled(model: nn.Module, resblocks: Resblocks, ranks: Ranks) -> BlockScaling:
    """Have resblocks compute in fp16, each at its gradient scale, and DeepSpeed reduce in fp16."""
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

    scales = BlockScales(resblocks.count, ranks.world, ranks.device)
    attach_scales(model, scales, torch.float16)
    for name, parameter in model.named_parameters():
        if name in resblocks.matrices:
            setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.float16)
    # cuBLAS may else add up parts of a long sum in fp16.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return BlockScaling(scales, resblocks, ranks)


def _node_mean(
    resblocks: Resblocks,
    settings: StageConfig,
    parallel: ParallelConfig,
    groups: Groups,
    ranks: Ranks,
    seed: int,
) -> NodeMean:
    # A rank that is a node's total is divided among as many shards under every ZeRO stage.
    of_node, rank = parallel.rank_of == "node", 0
    if parallel.between_nodes == "powersgd":
        rank = rank_of_shard(parallel.rank, groups.local_world_size) if of_node else parallel.rank
    return NodeMean(
        resblocks,
        groups,
        ranks,
        rank=rank,
        cuts=groups.local_world_size if of_node or settings.zero_stage == 3 else 1,
        seed=seed,
        options=PowerSGDOptions(
            comm_dtype=parallel.comm_dtype,
            p_scale=parallel.p_scale,
            q_scale=parallel.q_scale,
            error_dtype=parallel.error_dtype,
            warm_start=parallel.warm_start,
            products=parallel.products,
            refresh_every=parallel.refresh_every,
            start_step=parallel.start_step,
            dense_every=parallel.dense_every,
        ),
    )


def _outer(parallel: ParallelConfig, groups: Groups) -> OuterSGD:
    return OuterSGD(
        groups.replica,
        every=parallel.outer_every,
        lr=parallel.outer_lr,
        momentum=parallel.outer_momentum,
        dtype=parallel.outer_dtype,
    )


def _optimizer(model: nn.Module, settings: StageConfig, decayed: Container[str]) -> AdamW:
    return AdamW(
        param_groups(model, decayed, settings.weight_decay, settings.moments),
        # Some of DeepSpeed's wrappers step once on zero gradients: that must not move a weight.
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        variance_clip=settings.variance_clip,
        implementation=settings.adamw_backend,
    )


def _initialize(
    model: nn.Module,
    optimizer: AdamW,
    tree: dict[str, Any],
    settings: StageConfig,
    ranks: Ranks,
    groups: Groups | None,
    seed: int,
) -> Any:
    import deepspeed

    mpu = None if groups is None else NodeLocal(groups)
    _forget_earlier_engines()
    deepspeed.init_distributed(dist_init_required=False)  # else ZeRO-3 takes the world for one
    if settings.zero_stage == 3:
        scatter_large_ones_apart()
        _shard(model, tree, settings, ranks, groups, mpu, seed)
    elif on_meta(model):
        whole_weights(model, _initials(model), seed, ranks.device)
    else:
        model.to(ranks.device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=tree, mpu=mpu, dist_init_required=False
    )
    require_names(engine, shards(engine), settings.precision == "fp16")
    _adapt(engine)
    if settings.zero_stage == 3 and settings.precision == "fp16":
        keep_gathered_in_half(model)
    return engine


def _shard(
    model: nn.Module,
    tree: dict[str, Any],
    settings: StageConfig,
    ranks: Ranks,
    groups: Groups | None,
    mpu: NodeLocal | None,
    seed: int,
) -> None:
    """Weight by weight to shards on the devices: whole, the model may fit none of them."""
    import deepspeed

    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model.to(dtype)
    arguments = {
        "data_parallel_group": None if groups is None else groups.shard,
        "config_dict_or_path": tree,
        "dtype": dtype,
        "mpu": mpu,
    }
    if on_meta(model):
        rank = ranks.rank if groups is None else groups.shard_rank
        sharded_weights(model, _initials(model), seed, ranks.device, rank, arguments)
    else:
        deepspeed.zero.Init(module=model, **arguments)


def _initials(model: nn.Module) -> dict[str, Initial]:
    found = model.initials() if isinstance(model, TextImageTransformer) else None
    if found is None:
        raise ValueError("model: is on the meta device, and does not say what it starts from")
    return found


def _forget_earlier_engines() -> None:
    """DeepSpeed keeps the groups of an earlier engine of this process, also when they are gone."""
    from deepspeed.utils import groups

    require(groups, "groups", "mpu", "_WORLD_GROUP")
    groups.mpu = None
    if groups._WORLD_GROUP is not None:
        try:
            dist.get_process_group_ranks(groups._WORLD_GROUP)
        except (KeyError, ValueError):
            groups._WORLD_GROUP = None


def _adapt(engine: Any) -> None:
    """Undo what DeepSpeed does unasked to a fresh engine."""
    for state in engine.basic_optimizer.state.values():
        state["step"].zero_()
    # With its autocast comes a scaler of its own, which would scale the loss unasked.
    engine.optimizer.torch_autocast_gradscaler = None
    if int(engine.zero_optimization_stage()) == 3:
        keep_one_copy(engine.optimizer)


def _quieten() -> None:
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    # A C++ extension for CPU collectives that DeepSpeed would compile at the first start: a minute
    # and a compiler for what gloo does as well.
    compatible_ops["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_of_interest)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        # For DeepSpeed to fix: it calls what torch has renamed.
        warnings.filterwarnings("ignore", f".*{name}.* is deprecated", FutureWarning)


def _of_interest(record: logging.LogRecord) -> bool:
    """Not that the optimizer is ours: it is tested here."""
    return "untested optimizer" not in record.getMessage()
