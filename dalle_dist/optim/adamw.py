"""AdamW whose moments may take 16 bits (paper 2.4 and B.2), and which can leave weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from dalle_kernels.adamw import Hyperparameters, adamw_
from dalle_kernels.devices import triton_missing
from torch import Tensor

from dalle_dist.choices import AdamWBackend, values
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.optim import apex

MOMENTS = {"fp32": torch.float32, "16-bit": torch.uint16}
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay, bias-corrected moments, fp32 arithmetic on fp32 parameters.

    Each option but `implementation` may differ by group. State of a parameter: `step` (fp32 scalar
    on the CPU), `exp_avg` and `exp_avg_sq` (of its shape).

    While `skip` is true, `step()` leaves parameters and state as they are, bit for bit. `frozen`
    holds views of parameters, or of runs of their elements, whose weights and moments it leaves as
    they are; their `step` goes on.

    Args:
        params: parameters or groups of them. At a step they must be fp32 and dense: contiguous, or
            so with their dimensions in another order (channels-last). Gradients may be fp32, fp16
            or bf16.
        moments: "fp32", or "16-bit": mean in 1-6-9, variance in 0-6-10, half the bytes. A variance
            no longer moves when its goal is within 2^-11 / (1 - beta2) of it, because the step is
            less than half an ulp: 1% at the paper's beta2 of 0.96, but 49% at 0.999.
        variance_clip: the largest `exp_avg_sq`, before it is used or stored; 5 in the paper (B.2);
            0 is none.
        implementation: "torch"; "triton" (one pass); "apex" (NVIDIA's FusedAdam; fp32 moments and
            no clip); "auto": Triton on GPUs, else torch.

    Raises:
        ValueError: an option that is not one of the above.
        ConfigError: an implementation that cannot run here.
    """

    skip: bool
    frozen: Sequence[Tensor]

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "fp32",
        variance_clip: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        if implementation not in (known := values(AdamWBackend)):
            raise ValueError(f"implementation: {implementation!r} is not one of {', '.join(known)}")
        self.skip, self.frozen = False, ()
        self.implementation = implementation
        self._apex = apex.FusedUpdate() if implementation == "apex" else None
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "variance_clip": variance_clip,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check(self.param_groups[-1], self.implementation)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Groups of a file that torch's AdamW wrote have fp32 moments and no clip."""
        super().__setstate__({"skip": False, "frozen": (), **state})
        for group in self.param_groups:
            group.setdefault("moments", "fp32")
            group.setdefault("variance_clip", 0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `skip`.

        Raises:
            ValueError: a parameter or gradient of another dtype or layout than above.
            ConfigError: implementation "triton" on a device without it.
            CheckpointError: moments of another dtype than the group's `moments`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.skip:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state_of(param, group)
        step = int(state["step"]) + 1
        frozen = _ranges(param, self.frozen)
        tensors = _in_memory_order(param, grad, *(state[name] for name in MOMENT_NAMES))
        if not frozen:
            self._update_elements(tensors, step, group)
        for start, stop in _gaps(frozen, param.numel()) if frozen else ():
            parts = [tensor.view(-1)[start:stop] for tensor in tensors]
            self._update_elements(parts, step, group)
        state["step"] += 1

    def _update_elements(self, tensors: Sequence[Tensor], step: int, group: dict[str, Any]) -> None:
        """`tensors`: weights, their gradients, and both moments."""
        param, grad, mean, variance = tensors
        if self._apex is not None:
            state = dict(zip(MOMENT_NAMES, (mean, variance), strict=True))
            self._apex.update(param, grad, state, step, group)
        else:
            backend = self._backend(param.device)
            adamw_(param, grad, mean, variance, _hyperparameters(step, group), backend)

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """`step`, `exp_avg` and `exp_avg_sq` of a parameter of this group; zeros before a step.

        Raises CheckpointError: moments of another dtype than the group's `moments`.
        """
        state, dtype = self.state[param], MOMENTS[group["moments"]]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in MOMENT_NAMES:
                state[name] = torch.zeros_like(param, dtype=dtype)
        for name in MOMENT_NAMES:
            if state[name].dtype != dtype:
                raise CheckpointError(
                    f"optimizer state '{name}': {state[name].dtype}, but moments are "
                    f"{group['moments']}; a cast of packed moments has destroyed them"
                )
        return state

    def _backend(self, device: torch.device) -> str:
        if self.implementation == "triton":
            missing = triton_missing(device)
            if missing:
                raise ConfigError(f"implementation: 'triton' cannot run here: {missing}")
            return "triton"
        return "chunked" if self.implementation == "torch" and device.type != "cpu" else "auto"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over options and state bit for bit.

        Torch's own casts all state to the parameter's dtype, which makes numbers of packed words.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                device = "cpu" if name == "step" else param.device
                layout = param if value.shape == param.shape else value
                copied = torch.empty_like(layout, dtype=value.dtype, device=device)
                self.state[param][name] = copied.copy_(value)


def _in_memory_order(param: Tensor, grad: Tensor, *moments: Tensor) -> list[Tensor]:
    """All of them, dimensions in the order of the weights' memory; views, but for a gradient."""
    if param.is_contiguous():
        return [param.detach(), grad.contiguous(), *moments]
    order = sorted(range(param.dim()), key=param.stride, reverse=True)
    grad = grad.permute(order).contiguous()
    param, *others = (tensor.permute(order) for tensor in (param.detach(), *moments))
    return [param, grad, *others]


def _ranges(param: Tensor, views: Sequence[Tensor]) -> list[tuple[int, int]]:
    """First and last + 1 element of `param` that each view covers, of the views that lie in it."""
    found = []
    for view in views:
        start = (view.data_ptr() - param.data_ptr()) // param.element_size()
        if view.numel() and view.device == param.device and 0 <= start < param.numel():
            found.append((start, start + view.numel()))
    return sorted(found)


def _gaps(ranges: Sequence[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What the ranges, in order, leave of 0 ... end."""
    at = 0
    for start, stop in [*ranges, (end, end)]:
        if start > at:
            yield at, start
        at = max(at, stop)


def _hyperparameters(step: int, group: dict[str, Any]) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return Hyperparameters(
        step=step,
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        variance_clip=group["variance_clip"],
    )


def _check(group: dict[str, Any], implementation: str) -> None:
    if group["moments"] not in MOMENTS:
        raise ValueError(f"moments: {group['moments']!r} is not one of {', '.join(MOMENTS)}")
    for name in ("lr", "eps", "weight_decay", "variance_clip"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: {group[name]} is below 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas: {group['betas']} are not both in [0, 1)")
    if implementation == "apex" and (group["moments"] != "fp32" or group["variance_clip"]):
        raise ConfigError("implementation: 'apex' has neither 16-bit moments nor a variance clip")
