"""What `precision: auto` means on the hardware of a run."""

from __future__ import annotations

import torch

from dalle_dist.choices import Precision
from dalle_dist.distributed.process_group import Ranks


def decided(precision: Precision, ranks: Ranks) -> Precision:
    """`precision`, or for "auto" bf16 where all ranks compute in it, else fp32.

    A collective call for "auto": hardware may differ from rank to rank, and none may miss it.
    """
    if precision != "auto":
        return precision
    return "fp32" if ranks.any(not computes_in_bf16(ranks.device)) else "bf16"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 products; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)
