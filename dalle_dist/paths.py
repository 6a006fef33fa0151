"""What a path means before anything is read: its scheme, `~`, and names under a folder.

A scheme is letters and `://`. `file://` is a local path; `data:v1` has no scheme and is a folder
like any other. `s3://` is spoken by boto3, every other scheme by the fsspec package of its store.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from dalle_dist.errors import DataError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
_AS_S3 = ("s3a", "s3n")  # Hadoop's names


def scheme_of(path: str) -> str:
    """In lower case; empty for a local path, also one with `file://`."""
    found = _SCHEME.match(path)
    name = found[1].lower() if found else ""
    return "" if name in _LOCAL else name


def is_remote(path: str) -> bool:
    """Whether `path` has a scheme other than `file://`, known or not."""
    return bool(scheme_of(path))


def join(path: str, *parts: str) -> str:
    """With one slash between the parts."""
    return "/".join([path.rstrip("/"), *parts])


def normal(path: str) -> str:
    """`path` without `file://`, with `~` expanded; a remote one with its scheme in lower case.

    Raises:
        DataError: nothing here reads such a scheme; the line says which package would.
    """
    scheme = scheme_of(path)
    if scheme:
        _require_known(scheme, path)
        return scheme + path[len(scheme) :]
    found = _SCHEME.match(path)
    local = path[found.end() :].removeprefix("localhost/") if found else path
    if found and path[found.end() :].startswith("localhost/"):
        local = "/" + local
    return os.path.expanduser(local)  # noqa: PTH111 - a Path would drop a trailing slash


def inside(root: Path, name: str) -> Path:
    """The file `name` of the folder `root`. Raises DataError when it would lie elsewhere."""
    if not is_file_name(name):
        raise DataError(f"{name!r}: not a file's name under a folder; rename the object")
    return root / name


def is_file_name(name: str) -> bool:
    """Whether an object's name, relative to a folder, is that of one file under it."""
    parts = name.split("/")
    return "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def _require_known(scheme: str, path: str) -> None:
    if scheme == "s3":
        return
    if scheme in _AS_S3:
        raise DataError(f"{path}: {scheme}:// is Hadoop's name of it; write s3://")
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise DataError(
            f"{path}: unknown scheme {scheme}://; write s3://, file://, another that fsspec "
            "knows, or a local path"
        ) from None
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or scheme
        raise DataError(
            f"{path}: {scheme}:// needs a package that is not installed; "
            f"pip install {package.partition('.')[0]}"
        ) from None
