"""ZeRO-3 gathers fp16 parameters in fp16, and leaves them so.

DeepSpeed sends them in the communication dtype of its autocast and casts what arrives to the dtype
of the shard, fp32, which the product casts back to fp16: twice the memory of gathered weights, and
three passes over them for each forward, recomputed and backward pass. Here a marked parameter is
fp16 to everybody but its shard, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dalle_dist.engine.deepspeed.one_copy import flat_view, lie_together
from dalle_dist.engine.deepspeed.versions import require

_MARK = "stays_half"  # attribute of the parameters that are gathered here


def keep_gathered_in_half(model: nn.Module) -> None:
    """Of a fresh engine, whose optimizer has taken note of fp32 parameters.

    Raises RuntimeError: this DeepSpeed gathers in another way.
    """
    from deepspeed.runtime.torch_autocast import get_comm_dtype

    _patch()
    parameters: Iterable[Any] = model.parameters()
    for parameter in parameters:
        # Small ones are whole on every rank all the time, and gathered in other ways.
        if get_comm_dtype(parameter) == torch.float16 and not parameter.ds_persist:
            parameter.data = parameter.data.half()  # empty: it is a shard
            setattr(parameter, _MARK, True)


def _patch() -> None:
    from deepspeed.runtime.zero import partition_parameters

    module = "zero.partition_parameters"
    require(partition_parameters, module, "AllGatherCoalescedHandle", "AllGatherHandle")
    several = partition_parameters.AllGatherCoalescedHandle
    single = partition_parameters.AllGatherHandle
    require(several, "AllGatherCoalescedHandle", "wait", "data_buffer")
    if hasattr(several, "wait_in_fp32"):
        return
    several.wait_in_fp32 = several.wait

    def wait(self: Any, handle_dependency: bool = True) -> None:
        if self.complete or self.quantization or not hasattr(self.params[0], _MARK):
            several.wait_in_fp32(self, handle_dependency)
        else:
            _wait_in_half(self, handle_dependency)

    several.wait = wait
    start = single.__init__

    def init(self: Any, handle: Any, param: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("original_dtype") is not None and hasattr(param, _MARK):
            kwargs["original_dtype"] = torch.float16
        start(self, handle, param, *args, **kwargs)

    single.__init__ = init


def _wait_in_half(gathered: Any, handle_dependency: bool) -> None:
    """All parameters of a gather have one communication dtype, as DeepSpeed asserts."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    gathered.allgather_handle.wait()
    at, used = 0, []
    for parameter in gathered.params:
        numel = parameter.ds_tensor.ds_numel
        parts = _parts(parameter, gathered.partitions, at, numel)
        # One that came alone is whole already.
        whole = flat_view(parts) if lie_together(parts) else torch.cat(parts)
        parameter.data = whole.view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
        used += parts
        at += numel
    gathered.complete = True
    if get_accelerator().is_synchronized_device():
        return
    if handle_dependency:
        for part in used:
            part.record_stream(get_accelerator().current_stream())
    else:
        type(gathered).data_buffer.append(used)


def _parts(parameter: Any, partitions: list[Tensor], at: int, numel: int) -> list[Tensor]:
    """What each rank has sent of a parameter; the last ranks' ends lie beyond it."""
    lengths = [min(parameter.ds_numel - rank * numel, numel) for rank in range(len(partitions))]
    pairs = zip(partitions, lengths, strict=True)
    return [partition.narrow(0, at, length) for partition, length in pairs if length > 0]
