"""To a store, and verified there: a local file goes only when its copy is known to be right."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from dalle_dist.errors import DataError
from dalle_dist.paths import join
from dalle_dist.storage import local, retry
from dalle_dist.storage.retry import PassingTrouble
from dalle_dist.storage.settings import SETTINGS
from dalle_dist.storage.store import Content, Store, store_of

LAST = ("index.json", "manifest.json", "config.yaml")  # what makes a folder count goes up last
_LEDGER = ".uploaded.json"


def upload(path: str, content: Content) -> None:
    """Put an object and compare what the store has; a wrong object is deleted.

    Raises:
        DataError: it could not be put, or the store keeps something else.
    """
    store = store_of(path)

    def attempt() -> None:
        expected = store.put(path, content)
        _verify(store, path, content, expected)

    try:
        retry.call(attempt)
    except DataError as error:
        if _KEEPS in str(error):
            with contextlib.suppress(DataError, PassingTrouble):
                store.delete(path)
        raise


def _verify(store: Store, path: str, content: Content, expected: str) -> None:
    """Size always; content by the version that the store must give it, else by reading it back.

    A store that keeps aws-chunked framing shows it in the size, or, if it hides that, as the hex
    digits with which each part then begins. So what is read back is both ends of each part (of a
    small file all of it): a whole second transfer of each checkpoint would buy little more, since
    each part goes up with its MD5, which a store compares.
    """
    stat = retry.call(lambda: store.stat(path))
    if stat is None or stat.size != content.size:
        found = "nothing" if stat is None else f"{stat.size} bytes"
        raise PassingTrouble("upload", f"{path}: {_KEEPS} {found} of {content.size}; {_SPEAKS}")
    if expected and stat.version == expected:
        return
    for start, end in _samples(content.size):
        data = retry.call(lambda: store.read(path, start, end, "")).data  # noqa: B023
        if data != content.read(start, end):
            raise PassingTrouble("upload", f"{path}: {_KEEPS} other bytes; {_SPEAKS}")


_KEEPS = "the store keeps"
_SPEAKS = "see whether it speaks S3 in full"


def _samples(size: int) -> list[tuple[int, int]]:
    """Ranges that are read back."""
    if size <= SETTINGS.read_part:
        return [(0, size)] if size else []
    some, ranges = SETTINGS.sample, []
    for start in range(0, size, SETTINGS.write_part):
        end = min(start + SETTINGS.write_part, size)
        ranges += [(start, min(start + some, end)), (max(start, end - some), end)]
    return ranges


def upload_folder(folder: Path, path: str) -> None:
    """As `storage.publish_folder`."""
    ledger = folder / _LEDGER
    known: dict[str, list[float]] = json.loads(ledger.read_text()) if ledger.exists() else {}
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    names = [name for name in names if not Path(name).name.startswith(".")]
    names.sort(key=lambda name: (Path(name).name in LAST, name))
    for name in names:
        stat = (folder / name).stat()
        if known.get(name) != [stat.st_size, stat.st_mtime]:
            upload(join(path, name), Content.of_file(folder / name))
            known[name] = [stat.st_size, stat.st_mtime]
    store = store_of(path)
    for name in sorted(known.keys() - set(names)):
        target = join(path, name)
        retry.call(lambda: store.delete(target))  # noqa: B023 - called at once
        del known[name]
    local.write(ledger, lambda temporary: temporary.write_text(json.dumps(known)))
