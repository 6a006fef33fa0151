"""What of a config the counts need, with DeepSpeed's own settings and its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dalle_dist.config import Config, TrainConfig
from dalle_dist.engine.deepspeed.settings import (
    accumulation,
    check_together,
    deepspeed_config,
    micro_batch,
)
from dalle_dist.errors import ConfigError
from dalle_dist.plan.items import Layout, Sharing

# Defaults of DeepSpeed 0.19.8 (runtime/zero/config.py), in values.
_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "sub_group_size": 1e9,
}


@dataclass(frozen=True)
class Settings:
    """Of a run on so many ranks.

    precision     fp32, bf16 or fp16
    samples       of a micro-batch
    accumulation  micro-batches of an optimizer step on each rank
    weight_bytes  of a parameter as DeepSpeed holds it
    compute_bytes  of an activation inside a resblock
    fp16_by_fp32  products of fp16 go through fp32, as on CPUs
    """

    train: TrainConfig
    sharing: Sharing
    between: str
    precision: str
    samples: int
    accumulation: int
    reduce_bucket: int
    prefetch: int
    persistent_up_to: int
    max_live: int
    max_reuse: int
    sub_group: int
    fp16_by_fp32: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, config: Config, layout: Layout, has_bf16: bool) -> Settings:
        """Raises ConfigError as `build_engine` does, and for what the counts do not cover."""
        train = config.train
        if train.precision == "auto":
            train = replace(train, precision="bf16" if has_bf16 else "fp32")
        tree = deepspeed_config(train, layout.world)
        check_together(train, config.parallel, tree)
        zero = tree["zero_optimization"]
        if "offload_optimizer" in zero or "offload_param" in zero:
            raise ConfigError("train.deepspeed: a plan does not cover what DeepSpeed offloads")
        if train.zero_stage == 3 and zero["contiguous_gradients"]:
            raise ConfigError(
                "train.deepspeed: a plan does not cover zero_optimization.contiguous_gradients "
                "under ZeRO-3"
            )
        found = {key: int(zero.get(key, default)) for key, default in _DEFAULTS.items()}
        return cls(
            train,
            Sharing.of(config, layout),
            config.parallel.between_nodes,
            train.precision,
            micro_batch(train, layout.world),
            accumulation(train, layout.world),
            *found.values(),
        )

    @property
    def stage(self) -> int:
        return self.train.zero_stage

    @property
    def shards(self) -> int:
        """Ranks that share the weights; 1 where ZeRO shares nothing."""
        return self.sharing.shard_world if self.stage else 1

    @property
    def weight_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def compute_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def matrix_wire_bytes(self) -> int:
        """Of a matrix's value that is gathered under ZeRO-3, and of its gradient under ZeRO."""
        return 4 if self.precision == "fp32" else 2

    @property
    def other_wire_bytes(self) -> int:
        """The same of gains, biases and embeddings: fp16 leaves them in fp32."""
        return self.weight_bytes
