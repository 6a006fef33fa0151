"""Which parameters the optimizer decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Decays = Callable[[str, nn.Parameter], bool]


def resblock_matrices(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a 2-D parameter below a module named `blocks`.

    The paper gives the decay of stage 2 (4.5e-2, appendix B.2) but not its targets; gains, biases
    and embeddings are left alone, as is the custom of the field.
    """
    return "blocks" in name.split(".") and parameter.ndim == 2


def everything(name: str, parameter: nn.Parameter) -> bool:
    """All parameters, as AdamW decays them if nothing else is said (stage 1, paper A.2)."""
    return True


def param_groups(
    model: nn.Module, decays: Decays, weight_decay: float, moments: str = "fp32"
) -> list[dict[str, Any]]:
    """Two AdamW groups: the parameters that `decays` names, and all others undecayed.

    `moments` is the format of the decayed ones' moments; the others' are fp32 (paper 2.4).
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "moments": moments},
        {"params": others, "weight_decay": 0.0, "moments": "fp32"},
    ]
    return [group for group in groups if group["params"]]
