"""Which parameters the optimizer decays: the matrices of the resblocks, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(
    model: nn.Module, weight_decay: float, moments: str = "fp32"
) -> list[dict[str, Any]]:
    """Two AdamW groups: 2-D parameters below a module named `blocks`, and all others undecayed.

    `moments` is the format of the matrices' moments; the others' are fp32 (paper 2.4).

    The paper gives the decay (4.5e-2, appendix B.2) but not its targets; gains, biases and
    embeddings are left alone, as is the custom of the field.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            chosen = decayed if "blocks" in name.split(".") and parameter.ndim == 2 else others
            chosen.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "moments": moments},
        {"params": others, "weight_decay": 0.0, "moments": "fp32"},
    ]
    return [group for group in groups if group["params"]]
