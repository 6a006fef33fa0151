"""Folders of checkpoints, local or remote: which are whole, which are kept.

runs/X/checkpoints/step-00001000/   manifest.json, written last, and files of tensors
                  /latest           name of the newest whole one
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from dalle_dist import storage
from dalle_dist.checkpoint.manifest import Manifest, rank_of, read_manifest
from dalle_dist.checkpoint.names import MANIFEST, STEP, steps
from dalle_dist.checkpoint.tensor_file import digest
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import CheckpointError
from dalle_dist.storage.conditional import StoredCell
from dalle_dist.storage.local import flush
from dalle_dist.storage.store import Conflict, NoConditions

LATEST = "latest"
DAMAGED = f"{MANIFEST}.damaged"  # what the manifest of a checkpoint is called that was passed over
_REPLACED = ".old.tmp"  # after the name of a checkpoint of the same step


PHASES = ("prepared", "written", "reported", "manifest", "renamed", "latest", "pruned")


def phase(name: str) -> None:
    """Called when a phase of a save is over. Does nothing: tests end processes here."""


def step_folder(folder: str, step: int) -> str:
    """Where the checkpoint of a step lies in a folder of checkpoints."""
    return storage.join(folder, f"step-{step:08d}")


def fingerprint(checkpoint: str) -> str:
    """SHA-256 of the manifest, which depends on every byte of a checkpoint; no file is read."""
    return hashlib.sha256(storage.read_bytes(storage.join(checkpoint, MANIFEST))).hexdigest()


def newest(folder: str, ranks: Ranks | None = None, say: Callable[[str], None] = print) -> str:
    """The newest checkpoint of which every byte is as it was written, or "" when there is none.

    What is wrong with a newer one is said, and it is set aside: it counts no longer, and nothing of
    it is deleted. With `ranks` all of them must call this: they share the reading, and agree.
    """
    found = steps(folder) if ranks is None else ranks.on_main(lambda: _recovered_steps(folder))
    for step in reversed(found):
        checkpoint = step_folder(folder, step)
        wrong = problem(checkpoint, ranks)
        if wrong is None:
            return checkpoint
        if ranks is None or ranks.rank == 0:
            say(f"{checkpoint}: {wrong}; passed over")
        if ranks is not None:
            ranks.on_main(lambda checkpoint=checkpoint: _set_aside(checkpoint))  # type: ignore[misc]
    return ""


def _recovered_steps(folder: str) -> list[int]:
    if not storage.is_remote(folder):
        recover(Path(folder))
    return steps(folder)


def verify(checkpoint: str, ranks: Ranks | None = None) -> None:
    """Raise CheckpointError, naming the file, unless every byte is as it was written."""
    found = problem(checkpoint, ranks)
    if found is not None:
        raise CheckpointError(f"{checkpoint}: {found}; resume from another checkpoint")


def problem(checkpoint: str, ranks: Ranks | None = None) -> str | None:
    """What is wrong with a checkpoint, or None. Each file is read once, by one of the ranks.

    Raises DataError when a store does not answer: that says nothing of the checkpoint.
    """
    if ranks is None:
        return _problem(checkpoint, 0, 1)
    found = ranks.together(lambda: _problem(checkpoint, ranks.rank, ranks.world))
    return next((text for text in ranks.gather(found) if text), None)


def _problem(checkpoint: str, rank: int, world: int) -> str | None:
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error).removeprefix(f"{checkpoint}: ")
    present = set(storage.list_files(checkpoint))
    # In the order of ranks: with as many as wrote it, each reads what it will load.
    for name, entry in list(manifest.files.items()):
        if rank_of(name) % world != rank:
            continue
        if name not in present:
            return f"{name} is missing"
        try:
            file = storage.fetch(storage.join(checkpoint, name))
            size = file.stat().st_size
            if size != entry.bytes:
                return f"{name} has {size} bytes, saved with {entry.bytes}"
            if digest(file) != entry.xxh3:
                return f"{name} is damaged (its hash differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _set_aside(checkpoint: str) -> None:
    path = storage.join(checkpoint, MANIFEST)
    if storage.is_remote(checkpoint):
        storage.write_bytes(storage.join(checkpoint, DAMAGED), storage.read_bytes(path))
        storage.remove(path)
    else:
        Path(path).rename(storage.join(checkpoint, DAMAGED))


def recover(folder: Path) -> None:
    """Put back what was to be replaced, where the process ended before its successor was there."""
    for old in folder.glob(f"step-*{_REPLACED}"):
        final = old.with_name(old.name.removesuffix(_REPLACED))
        if not final.exists() and (old / MANIFEST).exists():
            old.rename(final)


def publish(
    partial: Path, target: str, manifest: Manifest, fence: Callable[[], None] = lambda: None
) -> None:
    """Have a checkpoint count whose files are written: in `partial`, or in a remote `target`.

    Args:
        fence: raises what ends this, unless this process alone may write to the run.

    Raises:
        CheckpointError: another process published one of this step meanwhile.
    """
    if storage.is_remote(target):
        _publish_there(target, manifest, fence)
        phase("renamed")
    else:
        (partial / MANIFEST).write_bytes(manifest.encoded())
        flush(partial / MANIFEST)
        flush(partial)
        phase("manifest")
        fence()
        final = Path(target)
        if final.exists():
            whole = (final / MANIFEST).exists()
            end = _REPLACED if whole else f".{secrets.token_hex(4)}.damaged"
            final.rename(final.with_name(f"{final.name}{end}"))
            phase("replaced")
        partial.rename(final)
        flush(final.parent)
        phase("renamed")


def point_at(target: str, fence: Callable[[], None] = lambda: None) -> None:
    """Have `latest` name a checkpoint that counts, for people. `fence`: as of `publish`."""
    folder, _, name = target.rpartition("/")
    fence()
    storage.write_bytes(storage.join(folder, LATEST), f"{name}\n".encode())
    phase("latest")


def _publish_there(target: str, manifest: Manifest, fence: Callable[[], None]) -> None:
    """In place of the manifest that a checkpoint of this step has now, if it has one.

    The store itself refuses a process that stops after the fence, until another has published.
    """
    path, data = storage.join(target, MANIFEST), manifest.encoded()
    cell = StoredCell(path, before=fence)
    fence()
    try:
        cell.write(data, cell.version())
    except NoConditions:  # the user sees to it that there is no other process
        storage.write_bytes(path, data)
    except Conflict:
        raise CheckpointError(
            f"{target}: another process saved this step meanwhile; end one of the two"
        ) from None


def prune(
    folder: str,
    step: int,
    keep: int,
    keep_every: int = 0,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Delete all but the newest `keep` up to `step`, and each step that `keep_every` divides.

    Those of later steps go too: they belong to a course that was left when an earlier checkpoint
    was resumed. So do files that saves which failed have left. `fence`: as of `publish`.
    """
    fence()
    present = steps(folder)
    wanted = set([s for s in present if s <= step][-keep:])
    if keep_every:
        wanted |= {s for s in present if 0 < s <= step and s % keep_every == 0}
    for old in present:
        if old not in wanted:
            fence()
            _delete(step_folder(folder, old))
    if storage.is_remote(folder):
        _delete_leftovers(folder, step, fence)
    else:
        for leftover in Path(folder).glob("step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def _delete(checkpoint: str) -> None:
    # Without its manifest a folder no longer counts, however far the removal gets.
    storage.remove(storage.join(checkpoint, MANIFEST))
    if storage.is_remote(checkpoint):
        for name in storage.list_files(checkpoint):
            storage.remove(storage.join(checkpoint, name))
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _delete_leftovers(folder: str, step: int, fence: Callable[[], None]) -> None:
    """Remote files that no manifest names; what was set aside stays as it is."""
    names: dict[str, set[str]] = {}
    for path in storage.list_files(folder):
        checkpoint, _, name = path.rpartition("/")
        if STEP.fullmatch(checkpoint):
            names.setdefault(checkpoint, set()).add(name)
    current = step_folder(folder, step).rpartition("/")[2]
    for checkpoint, found in names.items():
        target = storage.join(folder, checkpoint)
        if checkpoint == current:
            found -= {MANIFEST, *read_manifest(target).files}
        elif MANIFEST in found or storage.exists(storage.join(target, MANIFEST)):
            continue
        if found and DAMAGED not in found:
            fence()
            for name in found:
                storage.remove(storage.join(target, name))
