"""Checkpoint folders that are whole or absent: `step-00001000/` with a manifest of every file.

All ranks write into `step-00001000.tmp`; the manifest (sizes, sha256) goes in last, everything is
flushed to disk, and one rename makes the folder count. The ranks must share the file system.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import CheckpointError, UserError

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 22


def save(folder: Path, step: int, write: Callable[[Path], None], ranks: Ranks, keep: int) -> Path:
    """Let every rank `write` into one new checkpoint of `folder`; keep the newest `keep` of them.

    Checkpoints of later steps go too: they belong to an abandoned branch of the run.
    `write` may use collectives only if a failing rank still takes part in them.

    Raises:
        CheckpointError: on all ranks when one could not write; nothing of the step is left.
    """
    target = step_folder(folder, step)
    partial = folder / f"{target.name}.tmp"
    _attempt(partial, ranks, lambda: _prepare(folder, partial) if ranks.rank == 0 else None)
    _attempt(partial, ranks, lambda: _require_shared(partial))
    _attempt(partial, ranks, lambda: write(partial))
    digests: list[dict[str, Any]] = []
    _attempt(partial, ranks, lambda: digests.append(_describe(partial, ranks)))
    files = {name: entry for part in ranks.gather(digests[0]) for name, entry in part.items()}
    manifest = {"step": step, "world": ranks.world, "files": dict(sorted(files.items()))}
    _attempt(
        partial, ranks, lambda: _publish(partial, target, manifest) if ranks.rank == 0 else None
    )
    if ranks.rank == 0:
        _prune(folder, step, keep)
    ranks.barrier()
    return target


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a folder of checkpoints."""
    return folder / f"step-{step:08d}"


def fingerprint(path: Path) -> str:
    """Hex digits that depend on every file of a whole checkpoint; its files are not read."""
    return _sha256(path / MANIFEST)


def latest(folder: Path, ranks: Ranks | None = None) -> Path | None:
    """The newest whole checkpoint, or None; damaged and half-written ones are passed over.

    With `ranks`, all of them must call it: they share the work of reading and agree.
    """
    # Rank 0's list: on folders that differ, ranks would not check equally many.
    found = steps(folder) if ranks is None else ranks.broadcast(steps(folder))
    for step in reversed(found):
        path = step_folder(folder, step)
        if problem(path, ranks) is None:
            return path
    return None


def verify(path: Path, ranks: Ranks | None = None) -> None:
    """Raise CheckpointError, naming the file, unless every file of `path` is as it was saved."""
    found = problem(path, ranks)
    if found is not None:
        raise CheckpointError(f"{path}: {found}; resume from another checkpoint")


def problem(path: Path, ranks: Ranks | None = None) -> str | None:
    """What is wrong with a checkpoint, or None when each file has its size and sha256."""
    share = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    found = _problem(path, *share)
    if ranks is not None:
        found = next((text for text in ranks.gather(found) if text), None)
    return found


def steps(folder: Path) -> list[int]:
    """Steps of which `folder` holds a checkpoint, whole or not, in order."""
    if not folder.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def no_space(error: BaseException) -> bool:
    """Whether the error, or one behind it, says that the disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _nothing_free(partial: Path) -> bool:
    """torch.save hides the cause of a short write, but what it wrote still fills the disk."""
    return partial.parent.is_dir() and shutil.disk_usage(partial.parent).free < _CHUNK


def _attempt(partial: Path, ranks: Ranks, action: Callable[[], None]) -> None:
    """Run `action` on every rank; if it fails on one, clean up and raise the same line on all."""
    failure = None
    try:
        action()
    except (OSError, RuntimeError, UserError) as error:
        full = no_space(error) or _nothing_free(partial)
        reason = "disk full" if full else " ".join(str(error).split())
        failure = f"rank {ranks.rank}: {reason}" if ranks.world > 1 else reason
    failures = [text for text in ranks.gather(failure) if text]
    if failures:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        ranks.barrier()
        raise CheckpointError(
            f"{partial.with_suffix('')}: not saved ({failures[0]}); free space or choose another "
            "folder, then --resume auto goes on from the last whole checkpoint"
        )


def _prepare(folder: Path, partial: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _require_shared(partial: Path) -> None:
    """Or else `write` would fail on some ranks alone, while others wait in its collectives."""
    if not partial.is_dir():
        raise OSError(
            "it does not see the folder that rank 0 made: all ranks must share the run's folder "
            "(a remote run's working copy is in DALLE_DIST_CACHE)"
        )


def _describe(partial: Path, ranks: Ranks) -> dict[str, Any]:
    """Size and sha256 of this rank's share of the files, each flushed to disk."""
    names = [p.relative_to(partial).as_posix() for p in _files(partial)]
    return {name: _entry(partial / name) for name in names[ranks.rank :: ranks.world]}


def _entry(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _publish(partial: Path, target: Path, manifest: dict[str, Any]) -> None:
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(partial / MANIFEST)
    for directory in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
        _flush(directory)
    if target.exists():
        # Both renames are atomic, and the old name ends in .tmp: at no moment is a half seen.
        target.rename(target.with_name(f"{target.name}.old.tmp"))
    partial.rename(target)
    _flush(target.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    present = steps(folder)
    wanted = [s for s in present if s <= step][-keep:]
    for old in (step_folder(folder, s) for s in present if s not in wanted):
        # Without its manifest a folder no longer counts, however far the removal gets.
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _problem(path: Path, rank: int, world: int) -> str | None:
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"no checkpoint ({MANIFEST} is missing)"
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name in sorted(files)[rank::world]:
        file, entry = path / name, files[name]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, saved with {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} is damaged (sha256 differs)"
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
