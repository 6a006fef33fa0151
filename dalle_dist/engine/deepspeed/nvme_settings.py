"""What can be asked of ZeRO-3's offload to NVMe, and a folder of each process there."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dalle_dist.config import StageConfig
from dalle_dist.errors import ConfigError
from dalle_dist.storage.locks import take

NVME = "nvme"
_KEYS = {"device", "nvme_path", "pin_memory"}
_PREFIX = "dalle-dist-"
_claimed: list[int] = []  # descriptors, open for as long as this process lives


def on_nvme(tree: dict[str, Any]) -> bool:
    """Whether DeepSpeed's keys put the optimizer's state on NVMe."""
    return _device(tree, "offload_optimizer") == NVME


def check_nvme(stage: StageConfig, tree: dict[str, Any]) -> None:
    """Raises ConfigError: what NVMe is asked for is more than is tested here."""
    file = f"{stage.section}.deepspeed"
    if _device(tree, "offload_param") == NVME:
        raise ConfigError(
            f"{file}: zero_optimization.offload_param.device: nvme is not supported; say cpu"
        )
    if not on_nvme(tree):
        return
    if stage.zero_stage != 3:
        raise ConfigError(
            f"{file}: offload to nvme needs {stage.section}.zero_stage 3, but it is "
            f"{stage.zero_stage}"
        )
    if stage.moments != "fp32":
        raise ConfigError(
            f"{file}: offload to nvme needs {stage.section}.moments fp32, but they are "
            f"{stage.moments}"
        )
    for key in sorted(tree["zero_optimization"]["offload_optimizer"].keys() - _KEYS):
        raise ConfigError(
            f"{file}: remove zero_optimization.offload_optimizer.{key}: offload to nvme is tested "
            "without it"
        )


def claim_folder(stage: StageConfig, tree: dict[str, Any]) -> None:
    """Give this process a folder of its own in `nvme_path`, and remove those of dead processes.

    Raises ConfigError: there is no such folder, or it cannot be written to.
    """
    offload = tree["zero_optimization"]["offload_optimizer"]
    parent = Path(str(offload.get("nvme_path", "")))
    try:
        for old in parent.glob(f"{_PREFIX}*"):
            _remove_abandoned(old)
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    except OSError as error:
        raise ConfigError(
            f"{stage.section}.deepspeed: zero_optimization.offload_optimizer.nvme_path: '{parent}' "
            f"cannot be used ({error.strerror}); name a folder on a disk of each node"
        ) from error
    descriptor = os.open(folder, os.O_RDONLY)
    take(descriptor, fcntl.LOCK_EX)
    _claimed.append(descriptor)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    offload["nvme_path"] = folder


def _remove_abandoned(folder: Path) -> None:
    """A process that was killed leaves its files, but no lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _device(tree: dict[str, Any], key: str) -> Any:
    zero = tree.get("zero_optimization")
    section = zero.get(key) if isinstance(zero, dict) else None
    return section.get("device") if isinstance(section, dict) else None
