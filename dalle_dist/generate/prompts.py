"""Prompts from the command line, a text file, or the captions of shards."""

from __future__ import annotations

from collections.abc import Sequence

from dalle_dist import storage
from dalle_dist.data.shards import ShardSet
from dalle_dist.errors import DataError, UserError


def prompts_of(given: Sequence[str], file: str | None, shards: str | None) -> list[str]:
    """The prompts of whichever source is named, in its order.

    Raises:
        UserError: not exactly one source, a file that is not UTF-8, or one without a prompt.
    """
    if sum(map(bool, (given, file, shards))) != 1:
        raise UserError("prompts: give them as words, or --prompts FILE, or --captions SHARDS")
    if file is not None:
        return _lines(file)
    return list(given) if shards is None else _captions(shards)


def _lines(file: str) -> list[str]:
    try:
        text = storage.read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{file}: holds no prompt; write one on each line")
    return lines


def _captions(folder: str) -> list[str]:
    shards = ShardSet(folder, "images")
    captions = [shards.read(i).get("txt", b"").decode(errors="replace") for i in range(len(shards))]
    told = [caption.strip() for caption in captions if caption.strip()]
    if not told:
        raise DataError(f"{folder}: all captions are empty")
    return told
