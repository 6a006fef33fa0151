"""Saving while training goes on: a copy in memory, and a thread that writes it.

Every rank writes its own pieces into `step-00001000.tmp`, hashed on the way and flushed to disk;
rank 0 hears of all files, writes the manifest and renames the folder. Of a remote run each rank
uploads its files, under names of this save alone, and the manifest comes last; the ranks need no
common file system then.
"""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.manifest import FileEntry, Manifest, file_name
from dalle_dist.checkpoint.tensor_file import TensorFile
from dalle_dist.distributed import process_group
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import CheckpointError
from dalle_dist.storage.lease import LeaseLost

_SAVERS = itertools.count()
Kinds = Mapping[str, Sequence[Any]]  # of gradients.piece.Piece


class Staging:
    """Copies of pieces on the CPU, in memory that is kept from save to save.

    Args:
        folder: where the copies are files mapped into memory, which need not hold them all.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self._from_gpu, self._folder = device.type == "cuda", folder
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, kinds: Kinds) -> dict[str, dict[str, Tensor]]:
        """By kind and `Piece.key`; they stay as they are until the next call."""
        copies = {
            kind: {piece.key: self._copied(kind, piece.key, piece.values) for piece in pieces}
            for kind, pieces in kinds.items()
        }
        if self._from_gpu:
            torch.cuda.synchronize()
        return copies

    def _copied(self, kind: str, key: str, values: Tensor) -> Tensor:
        name = f"{kind} {key}"
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (values.shape, values.dtype):
            buffer = self._buffers[name] = self._buffer(values)
        return buffer.copy_(values, non_blocking=True)

    def _buffer(self, values: Tensor) -> Tensor:
        if self._folder is None or not values.numel():
            return torch.empty(values.shape, dtype=values.dtype, pin_memory=self._from_gpu)
        file = self._folder / f"copy-{len(self._buffers)}-{secrets.token_hex(4)}"
        try:
            _reserve(file, values.nbytes)
            mapped = torch.from_file(
                str(file), shared=True, size=values.numel(), dtype=values.dtype
            )
        finally:
            file.unlink(missing_ok=True)  # what is mapped stays until it is let go
        return mapped.view(values.shape)


def _reserve(file: Path, size: int) -> None:
    """Make a file of so many bytes: a write to mapped memory that finds no room kills the process.

    Raises CheckpointError: there is no room.
    """
    try:
        with file.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
    except OSError as error:
        raise CheckpointError(
            f"{file.parent}: no room for {size:,} bytes of the copy that a checkpoint is written "
            f"from ({error.strerror}); free space there"
        ) from error


class Saver:
    """Writes checkpoints of a run into `folder`, one at a time.

    Args:
        folder: of checkpoints, local and then common to all ranks, or remote.
        scratch: a local folder, where files of a remote run lie until they are uploaded.
        keep: newest checkpoints that are kept.
        keep_every: checkpoints of steps that this divides are kept too; 0: none.
        fence: asked by rank 0's thread before it changes what counts; raises LeaseLost when another
            process has taken the run over.
        copies: a local folder for the copies that are being written, where main memory has no room
            for them.
    """

    def __init__(
        self,
        folder: str,
        ranks: Ranks,
        scratch: Path,
        keep: int,
        keep_every: int = 0,
        fence: Callable[[], None] = lambda: None,
        copies: Path | None = None,
    ) -> None:
        self.folder, self._ranks = folder, ranks
        self._scratch = scratch / f"rank-{ranks.rank}"
        self._keep, self._keep_every, self._fence = keep, keep_every, fence
        self._staging = Staging(ranks.device, copies)
        # All ranks make theirs in the same order; each has keys of its own in the common store.
        self._board, self._number = process_group.board(f"saver-{next(_SAVERS)}"), 0
        self._thread: threading.Thread | None = None
        self._target = ""

    def save(self, manifest: Manifest, kinds: Kinds) -> None:
        """Copy the pieces, and write them while the caller goes on; all ranks together.

        Args:
            manifest: that of rank 0 counts; its files are added.

        Raises:
            CheckpointError: on all ranks, when the save before this one failed on one.
        """
        self.wait()
        copies = self._staging.copy(kinds)
        self._number += 1
        self._target = store.step_folder(self.folder, manifest.step)
        self._thread = threading.Thread(
            target=self._run, args=(self._target, manifest, copies), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in progress has come to nothing."""
        done = f"{self._number}/done"
        return (
            self._thread is not None and self._board.posted(done) and bool(self._board.read(done))
        )

    def wait(self) -> None:
        """Return when nothing is being written; all ranks together.

        Raises CheckpointError on all ranks when it failed on one; nothing of the step counts.
        """
        if self._thread is None:
            return
        (failure,) = self._board.await_all([f"{self._number}/done"])
        self._thread.join()
        self._thread = None
        if failure:
            raise CheckpointError(failure)

    def close(self, timeout: float) -> None:
        """Give what is being written up to `timeout` seconds to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, target: str, manifest: Manifest, copies: dict[str, dict[str, Tensor]]) -> None:
        """The thread: all ranks write, rank 0 makes it count, all hear how it went."""
        with suppress(dist.DistError):  # the ranks' store is gone, and so is the run
            self._take_part(target, manifest, copies)

    def _take_part(
        self, target: str, manifest: Manifest, copies: dict[str, dict[str, Tensor]]
    ) -> None:
        main, number = self._ranks.rank == 0, self._number
        if main:
            self._post(f"{number}/prepared", lambda: self._prepare(target))
        ((failure, name),) = self._board.await_all([f"{number}/prepared"])
        if failure:
            if main:
                self._board.post(f"{number}/done", failure)
            return
        remote = storage.is_remote(target)
        partial = (self._scratch if remote else Path(self.folder)) / name
        self._post(
            f"{number}/rank-{self._ranks.rank}", lambda: self._write(partial, target, copies)
        )
        if main:
            self._conclude(partial, target, manifest)

    def _prepare(self, target: str) -> str:
        """Rank 0: make room, where the ranks share a folder; the name for what is not yet whole.

        It is of this save alone: a process that was replaced may still be writing to its own.
        """
        name = f"{target.rpartition('/')[2]}.{secrets.token_hex(4)}.tmp"
        self._fence()
        if not storage.is_remote(target):
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            store.recover(Path(self.folder))
            for leftover in Path(self.folder).glob("step-*.tmp"):
                shutil.rmtree(leftover)
            (Path(self.folder) / name).mkdir()
        return name

    def _post(self, key: str, action: Any) -> None:
        """Tell what an action gave, or in one line why it failed."""
        value: Any = None
        try:
            value, failure = action(), ""
        except Exception as error:
            failure = self._failure(error)
        self._board.post(key, [failure, value])

    def _failure(self, error: Exception) -> str:
        """The line with which all ranks end."""
        if isinstance(error, LeaseLost):
            return str(error)
        fix = "free space or choose another folder"
        if storage.is_remote(self.folder):
            fix = "see to the store or choose another folder"
        return (
            f"{self._target}: not saved ({self._reason(error)}); {fix}, then --resume auto goes "
            "on from the last whole checkpoint"
        )

    def _reason(self, error: Exception) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = "disk full"
        elif isinstance(error, MemoryError):
            text = "out of memory"
        return f"rank {self._ranks.rank}: {text}" if self._ranks.world > 1 else text

    def _write(
        self, partial: Path, target: str, copies: dict[str, dict[str, Tensor]]
    ) -> dict[str, Any]:
        """This rank's files; what the manifest says of them."""
        remote = storage.is_remote(target)
        if remote:
            shutil.rmtree(self._scratch, ignore_errors=True)
            partial.mkdir(parents=True)
        elif not partial.is_dir():
            raise OSError(
                "it does not see the folder that rank 0 made: all ranks must share the run's "
                "folder, or the run must lie in a store (s3://...)"
            )
        store.phase("prepared")
        save = secrets.token_hex(4) if remote else ""
        entries = {}
        for kind, pieces in sorted(copies.items()):
            if pieces:
                name = file_name(kind, self._ranks.rank, save)
                entries[name] = asdict(_write_file(partial / name, pieces))
                if remote:
                    storage.publish(partial / name, storage.join(target, name))
        if remote:
            partial.rmdir()
        store.phase("written")
        return entries

    def _conclude(self, partial: Path, target: str, manifest: Manifest) -> None:
        """Rank 0, when all have written: the manifest, the rename, and what need not be kept."""
        ranks = [f"{self._number}/rank-{rank}" for rank in range(self._ranks.world)]
        outcomes = self._board.await_all(ranks)
        store.phase("reported")
        failure = next((text for text, _ in outcomes if text), "")
        if not failure:
            files = {name: FileEntry(**e) for _, part in outcomes for name, e in part.items()}
            failure = self._count(
                partial, target, replace(manifest, files=dict(sorted(files.items())))
            )
        if failure:
            shutil.rmtree(partial, ignore_errors=True)
        self._board.forget([*ranks, f"{self._number - 1}/done"])
        self._board.post(f"{self._number}/done", failure)

    def _count(self, partial: Path, target: str, manifest: Manifest) -> str:
        """Publish and tidy up; why that failed, in one line."""
        try:
            store.publish(partial, target, manifest, self._fence)
        except Exception as error:
            return self._failure(error)
        try:
            store.point_at(target, self._fence)
            store.prune(self.folder, manifest.step, self._keep, self._keep_every, self._fence)
        except LeaseLost as error:
            return str(error)
        except Exception as error:
            return (
                f"{target}: saved, but tidying up after it failed ({self._reason(error)}); see to "
                "it, then --resume auto goes on from this checkpoint"
            )
        store.phase("pruned")
        return ""


def _write_file(path: Path, pieces: Mapping[str, Tensor]) -> FileEntry:
    shapes = {key: (values.dtype, tuple(values.shape)) for key, values in pieces.items()}
    with TensorFile(path, shapes) as file:
        for key, values in sorted(pieces.items()):
            file.begin(key)
            file.add(values)
    written = file.written
    numels = {key: values.numel() for key, values in sorted(pieces.items())}
    return FileEntry(written.bytes, written.xxh3, numels)
