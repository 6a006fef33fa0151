"""DeepSpeed's checkpoint files, read without running code and written without leaving peers behind.

DeepSpeed reads its files with full unpickling, which runs whatever a stranger put into them.
"""

from __future__ import annotations

from typing import Any

import torch


def safe_checkpoint_engine() -> Any:
    """A DeepSpeed checkpoint engine for `engine.checkpoint_engine`.

    `error` holds the first failure of a write: raising it at once would leave the other ranks in
    DeepSpeed's next barrier for ever.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):
        error: Exception | None = None

        def save(self, state_dict: Any, path: str) -> None:
            try:
                torch.save(state_dict, path)
            except (OSError, RuntimeError) as error:
                self.error = self.error or error

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(_harmless()):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpointEngine()


def _harmless() -> list[Any]:
    """Plain records that DeepSpeed puts into its files."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
