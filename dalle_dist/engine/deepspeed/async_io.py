"""DeepSpeed's extension that reads and writes NVMe, compiled before a run begins.

Torch guards a compilation with a file. A process that is killed leaves it behind, and then every
later one waits for it without end. Here the processes of a node wait for a lock that ends with its
owner, and the first that has it removes such a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dalle_dist.engine.deepspeed.nvme_settings import check_folder, on_nvme
from dalle_dist.engine.deepspeed.versions import ANY_VERSION, TESTED
from dalle_dist.errors import ConfigError
from dalle_dist.storage.locks import locked

_NAMES = ("async_io", "pin_memory")  # the second is a part of the first


def require_async_io(section: str, deepspeed: dict[str, Any]) -> None:
    """Compile and load the extension, if a section's `deepspeed` keys ask for NVMe.

    Takes minutes the first time on a machine; then it lies in $TORCH_EXTENSIONS_DIR, or in
    ~/.cache/torch_extensions.

    Raises ConfigError: libaio, a compiler, the CUDA toolkit or something else that it needs is
    missing, or the folder on NVMe is, or this DeepSpeed is not the one that offload to NVMe is
    tested with.
    """
    if not on_nvme(deepspeed):
        return
    check_folder(section, deepspeed)
    import deepspeed as package
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if package.__version__ != TESTED[0] and os.environ.get(ANY_VERSION) != "1":
        raise ConfigError(
            f"{section}.deepspeed: offload to nvme is tested with DeepSpeed {TESTED[0]} alone, and "
            f"this is {package.__version__}; install that, or offload to cpu"
        )

    folder = _extensions()
    try:
        with locked(folder / "dalle-dist.lock"):
            for lock in (lock for name in _NAMES for lock in folder.glob(f"**/{name}/lock")):
                lock.unlink()
            _require_cuda()
            if not any(folder.glob("**/async_io/async_io.so")):
                print("DeepSpeed's async_io is being compiled: some minutes, once", flush=True)
            AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{section}.deepspeed: offload to nvme needs DeepSpeed's async_io, which does not "
            f"compile here ({reason}); install libaio-dev, g++, ninja and, for GPUs, the CUDA "
            "toolkit, or offload to cpu"
        ) from error


def _require_cuda() -> None:
    """DeepSpeed looks for the toolkit's headers without asking whether it is there."""
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.cuda.is_available() and torch.version.hip is None and CUDA_HOME is None:
        raise OSError("no CUDA toolkit is found; where it is, CUDA_HOME must say")


def _extensions() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
