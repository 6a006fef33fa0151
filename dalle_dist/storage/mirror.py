"""A remote folder as a local one of links into the cache, for as long as the process lives."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dalle_dist.errors import DataError
from dalle_dist.paths import inside, is_file_name, join
from dalle_dist.storage import cache, local, retry
from dalle_dist.storage.locks import take
from dalle_dist.storage.store import Store, store_of

_SHOWN = 3  # names in a line about those that are left out


def names_in(folder: str) -> list[str]:
    """As `storage.list_files`, of a remote folder."""
    store, names, after = store_of(folder), [], ""
    while True:
        page = retry.call(lambda: store.list_page(folder, after))  # noqa: B023 - called at once
        names += page.names
        after = page.after
        if not after:
            # Consoles show a folder by an empty object whose key ends with a slash.
            return sorted(name for name in names if name and not name.endswith("/"))


def file_names(folder: str, names: Iterable[str]) -> list[str]:
    """Those that can be files of one local folder; how many cannot is printed in one line.

    A key may have `..`, an empty part, or be both an object and the folder of others.
    """
    names = list(names)
    folders = {name[:i] for name in names for i, c in enumerate(name) if c == "/"}
    good = [name for name in names if is_file_name(name) and name not in folders]
    bad = [name for name in names if name not in set(good)]
    if bad:
        shown = ", ".join(map(repr, bad[:_SHOWN])) + (" ..." if len(bad) > _SHOWN else "")
        line = f"{folder}: left out {len(bad)} objects whose keys are no names of files ({shown})"
        print(line, file=sys.stderr, flush=True)
    return good


def mirror(folder: str, suffixes: tuple[str, ...]) -> Path:
    """As `storage.fetch_folder`, of a remote folder. Raises DataError."""
    names = file_names(folder, (n for n in names_in(folder) if n.endswith(suffixes)))
    if not names:
        raise DataError(f"{folder}: no such folder")
    store, root = store_of(folder), _new(folder)
    for name in names:
        _link(store, join(folder, name), inside(root, name))
    return root


def _new(folder: str) -> Path:
    """A folder of this process alone: another may be reading an earlier one."""
    parent = cache.cache_folder() / "folders"
    digest = hashlib.sha256(folder.encode()).hexdigest()[:32]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(dir=parent, prefix=f"{digest}-"))
        # Held until the process ends, however it ends, and its children: eviction looks at it.
        lock = root.with_name(root.name + ".lock")
        take(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), fcntl.LOCK_EX)
    except OSError as error:
        raise local.not_written(parent, error) from None
    atexit.register(_remove, root, lock, os.getpid())
    return root


def _remove(root: Path, lock: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child goes before those that read
        shutil.rmtree(root, ignore_errors=True)
        lock.unlink(missing_ok=True)


def _link(store: Store, path: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = cache.fetch(store, path, None, None)
        try:
            # A second name of the same file, so that it stays when the cache deletes its own.
            target.hardlink_to(copy)
        except OSError:  # a file system without such links
            shutil.copyfile(copy, target)
    except OSError as error:
        raise local.not_written(target, error) from None
