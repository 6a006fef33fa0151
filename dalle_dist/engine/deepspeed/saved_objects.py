"""What DeepSpeed puts into its checkpoints that only DeepSpeed can make: its objects and scripts.

`checkpoint/export/` writes them; nothing here is part of training.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def version() -> str:
    import deepspeed

    return str(deepspeed.__version__)


def loss_scaler() -> Any:
    """The scaler of an engine that scales no loss. ZeRO-3 loads no checkpoint without one."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    return LossScaler(scale=1)


def address(start: int, numel: int) -> Any:
    """Where in its rank's flat partition elements of a parameter lie; `ds_to_universal` asks."""
    from deepspeed.utils.tensor_fragment import fragment_address

    return fragment_address(start=start, numel=numel)


def universal_info() -> dict[str, Any]:
    """What `ds_to_universal` asks of a checkpoint."""
    from deepspeed.checkpoint import constants

    return {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
    }


def copy_script(folder: Path) -> str:
    """Put DeepSpeed's script that reads weights out of a ZeRO checkpoint there; its name."""
    from deepspeed.utils import zero_to_fp32

    source = Path(str(zero_to_fp32.__file__))
    shutil.copyfile(source, folder / source.name)
    (folder / source.name).chmod(0o755)
    return source.name
