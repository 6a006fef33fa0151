"""Captions out of files as people have them: in an encoding that is named, never a guessed one."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from typing import Any

from dalle_dist.errors import DataError

FROM = ("beside", "folder", "file")  # beside: NAME.txt; else the name of the folder, or of the file
CHOICES = ("first-line", "all", "random")
NO_CAPTION = "no caption"
# The longer marks first: UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HOW = "name its encoding with --encoding NAME (gbk, cp1252, shift-jis, utf-16-le ...)"
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
NUMBER_AT_END = re.compile(r"[\s_\-.]*(?:\(\d+\)|(?<![^\W_])\d+)$")


class CaptionError(ValueError):
    """Why there is no caption."""


def check_encoding(name: str | None) -> None:
    """Raises DataError: no encoding of texts has this name."""
    try:
        # Of no bytes Python does not look the encoding up.
        with contextlib.suppress(UnicodeError):
            b"a".decode(name or "utf-8")
    except LookupError:
        raise DataError(
            f"--encoding {name}: not an encoding; e.g. gbk, cp1252, shift-jis"
        ) from None


def decoded(data: bytes, encoding: str | None) -> str:
    """By its byte order mark, else in `encoding`, else in UTF-8.

    Raises:
        CaptionError: it is in none of these.
    """
    found = next((name for mark, name in MARKS if data.startswith(mark)), encoding or "utf-8")
    try:
        text = data.decode(found)
    except UnicodeError:
        how = HOW if encoding is None else "as --encoding says"
        raise CaptionError(
            f"the caption is not {found.removesuffix('-sig').upper()}; {how}"
        ) from None
    return whole(text)


def whole(text: str) -> str:
    """The text as it is.

    Raises:
        CaptionError: it holds NUL, or (from a table) bytes that are not in the encoding.
    """
    if "\0" in text:
        raise CaptionError(f"the caption holds NUL; {HOW}")
    if HALF_A_CHARACTER.search(text):
        raise CaptionError(f"the caption is not whole text; {HOW}")
    return text


def chosen(text: str, choice: str) -> str:
    """The lines of a caption that are used, by one of `CHOICES`; "" if there are none."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if choice == "first-line":
        return lines[0] if lines else ""
    return (" " if choice == "all" else "\n").join(lines)


def in_json(data: bytes, encoding: str | None) -> str:
    """The caption, or captions as lines, under "caption" of a JSON object; "" if there is none.

    Raises:
        CaptionError: not JSON, or its text is not in the encoding.
    """
    try:
        tree: Any = json.loads(decoded(data, encoding))
    except json.JSONDecodeError:
        raise CaptionError("the caption's JSON cannot be read") from None
    found = tree.get("caption") if isinstance(tree, dict) else None
    lines = found if isinstance(found, list) else [found]
    return whole("\n".join(" ".join(line.split()) for line in lines if isinstance(line, str)))


def of_name(name: str) -> str:
    """A name as a caption: "red-panda_012" is "red panda"."""
    while (shorter := NUMBER_AT_END.sub("", name)) != name:
        name = shorter
    return " ".join(re.sub(r"[_\-]+", " ", name).split())
