"""Means between nodes begin in the backward pass, as soon as ZeRO-3 has a wave's gradients.

ZeRO-3 reduces gradients bucket by bucket and puts each rank's part into a buffer that it keeps from
step to step. When the matrices of a wave (`gradients/waves.py`) are there, the wave is sent, while
the backward pass goes on to earlier layers. ZeRO 1 and 2 put parts together after it, so that there
nothing can be sent earlier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dalle_dist.gradients.piece import Piece

Send = Callable[[Sequence[Piece], int], None]


class BackwardSends:
    """Watches ZeRO-3's gradients, and sends waves in their order.

    Args:
        optimizer: of a DeepSpeed engine of ZeRO-3.
        wave_of: the wave of each matrix, by the name of its parameter.
        send: starts the means up to a wave, given this rank's gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any,
        wave_of: Mapping[str, int],
        send: Send,
        device: torch.device,
    ) -> None:
        self._send, self._partition = send, optimizer.partition_grads
        self._wave_of = {
            id(parameter): wave_of[name]
            for name, parameter in module.named_parameters()
            if name in wave_of and parameter.requires_grad
        }
        self._missing: Counter[int] = Counter()
        self._next = 0
        # Where they lie is known from the last step on.
        self._gradients: Sequence[Piece] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        optimizer.partition_grads = self._partitioned

    def watch(self) -> None:
        """The backward pass that begins now makes gradients final."""
        self._missing, self._next = Counter(self._wave_of.values()), 0

    def end(self, gradients: Sequence[Piece]) -> None:
        """After the backward pass: what is sent from now on follows what has been."""
        self._missing, self._gradients = Counter(), gradients
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _partitioned(self, parameters: Sequence[Any], parts: Sequence[Tensor]) -> Any:
        result = self._partition(parameters, parts)
        if self._missing and self._gradients is not None:
            self._missing.subtract(
                self._wave_of[id(p)] for p in parameters if id(p) in self._wave_of
            )
            self._send_what_is_there(self._gradients)
        return result

    @torch.no_grad()
    def _send_what_is_there(self, gradients: Sequence[Piece]) -> None:
        """All ranks send the same waves in the same order, whatever arrives first on which."""
        while self._next in self._missing and self._missing[self._next] == 0:
            with self._beside():
                self._send(gradients, self._next)
            self._next += 1

    def _beside(self) -> AbstractContextManager[Any]:
        """On GPUs in a stream of its own, after what the present one and the device's own do."""
        if self._stream is None:
            return nullcontext()
        # Memory freed by the step that was made in the device's own stream is taken again here.
        self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)
