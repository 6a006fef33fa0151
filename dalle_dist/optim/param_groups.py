"""Which parameters the optimizer decays."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn


def param_groups(
    model: nn.Module, decayed: Container[str], weight_decay: float, moments: str = "fp32"
) -> list[dict[str, Any]]:
    """Two AdamW groups: the parameters named in `decayed`, and all others, which do not decay.

    `moments` is the format of the decayed ones' moments; the others' are fp32 (paper 2.4).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in named if name in decayed]
    outside = [p for name, p in named if name not in decayed]
    groups = [
        {"params": inside, "weight_decay": weight_decay, "moments": moments},
        {"params": outside, "weight_decay": 0.0, "moments": "fp32"},
    ]
    return [group for group in groups if group["params"]]
