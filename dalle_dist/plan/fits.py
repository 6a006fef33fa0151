"""What does not fit, each with its fix in one line."""

from __future__ import annotations

from dalle_dist.config import Config
from dalle_dist.plan.hardware import Hardware
from dalle_dist.plan.items import total
from dalle_dist.plan.memory import GPUMemory
from dalle_dist.plan.settings import Settings


def misfits(
    config: Config, settings: Settings, memory: GPUMemory, hardware: Hardware
) -> tuple[str, ...]:
    """Lines; none where the run fits."""
    lines = []
    if settings.precision == "bf16" and not hardware.bf16:
        lines.append(f"{hardware.name} does not compute in bf16: train.precision=fp16")
    room = hardware.usable * hardware.memory
    need = memory.total + hardware.context
    if need > room:
        held = total(memory.held) + hardware.context
        lines.append(
            f"GPU memory: {need / 1e9:,.1f} GB at the fullest moment ({memory.fullest}), and "
            f"{room / 1e9:,.1f} GB can be used"
        )
        lines += [
            f"  {line}" for line in _fixes(config, settings, memory, held > room, hardware.bf16)
        ]
    return tuple(lines)


def _fixes(
    config: Config, settings: Settings, memory: GPUMemory, state_alone: bool, has_bf16: bool
) -> list[str]:
    train, parallel, lines = config.train, config.parallel, []
    if memory.fullest == "sample images":
        lines.append("train.prompts=[]: samples of a checkpoint can be drawn by `generate`")
    if settings.stage < 3:
        lines.append(f"train.zero_stage={settings.stage + 1}: ZeRO shares more among the ranks")
    if train.moments == "fp32":
        lines.append("train.moments=16-bit: 4 bytes less for each value of a matrix")
    if parallel.between_nodes == "powersgd" and parallel.error_dtype == "fp32":
        lines.append("parallel.error_dtype=1-6-9: error buffers of half the size")
    if settings.precision != "bf16" and settings.stage == 3 and has_bf16:
        lines.append("train.precision=bf16: parameters of half the size")
    if not state_alone and settings.samples > 1:
        lines.append(f"train.micro_batch={settings.samples // 2}: half the activations")
    if not train.checkpoint_activations:
        lines.append("train.checkpoint_activations=true: the inputs of layers alone are kept")
    if settings.reduce_bucket > 50_000_000:
        bucket = "{zero_optimization: {reduce_bucket_size: 50000000}}"
        lines.append(f"'train.deepspeed={bucket}': smaller buckets")
    if state_alone:
        lines.append("more GPUs per node, or parallel.between_nodes=zero: smaller shares")
    return lines
