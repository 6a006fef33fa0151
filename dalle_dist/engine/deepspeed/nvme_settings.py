"""What can be asked of ZeRO-3's offload to NVMe, and a folder of each process there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dalle_dist.config import StageConfig
from dalle_dist.distributed.process_group import before_leaving
from dalle_dist.errors import ConfigError
from dalle_dist.storage.locks import locked, take

NVME = "nvme"
_KEYS = {"device", "nvme_path", "pin_memory"}
_PREFIX = f"dalle-dist-{os.getuid()}-"  # users cannot remove, nor lock, one another's
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


def check_folder(section: str, tree: dict[str, Any]) -> None:
    """Raises ConfigError: `nvme_path` of keys that put state on NVMe is no folder to write to."""
    path = _nvme_path(tree)
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise ConfigError(
            f"{section}.deepspeed: zero_optimization.offload_optimizer.nvme_path: '{path}' is no "
            "folder that can be written to; name one on a disk of each node"
        )


def claim_folder(tree: dict[str, Any]) -> Path:
    """A new folder of this process in `nvme_path`, for as long as it lives.

    This user's of processes that were killed are removed: they left their files, but no lock.
    """
    parent = _nvme_path(tree)
    with locked(parent / f"{_PREFIX}lock"):  # no other process sees a folder before its lock
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        descriptor = os.open(folder, os.O_RDONLY)
        take(descriptor, fcntl.LOCK_EX)
        if not _unlocked(folder):  # else locks say nothing here of who lives
            for other in filter(_unlocked, parent.glob(f"{_PREFIX}*/")):
                shutil.rmtree(other, ignore_errors=True)
    _claimed.append(descriptor)
    before_leaving(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


def place_on_nvme(tree: dict[str, Any]) -> None:
    """Have DeepSpeed put its files into a folder of this process alone."""
    tree["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(claim_folder(tree))


def _nvme_path(tree: dict[str, Any]) -> Path:
    return Path(str(tree["zero_optimization"]["offload_optimizer"].get("nvme_path", "")))


def _unlocked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # another process ended and took it away
        return False
    try:
        return take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _device(tree: dict[str, Any], key: str) -> Any:
    zero = tree.get("zero_optimization")
    section = zero.get(key) if isinstance(zero, dict) else None
    return section.get("device") if isinstance(section, dict) else None
