"""Headers of tar members without owner and time, so that a shard's bytes depend on its samples.

The standard library makes them, twenty microseconds each; that of a plain name is filled into a
copy of one, in two. Sources: POSIX.1-2017, pax, "ustar Interchange Format".
"""

from __future__ import annotations

import tarfile

SIZE, CHECKSUM = slice(124, 136), slice(148, 156)
LARGEST = 8**11  # bytes that eleven octal digits can say


def made_by_the_library(name: str, size: int) -> bytes:
    """The header of a member, with those that a long or foreign name needs before it."""
    member = tarfile.TarInfo(name)
    member.size, member.uname, member.gname = size, "root", "root"
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_BLANK = bytearray(made_by_the_library("", 0))
_BLANK[SIZE], _BLANK[CHECKSUM] = bytes(12), b" " * 8
_SUM = sum(_BLANK)
_AFTER_NAME = bytes(_BLANK[: SIZE.start])
_TIME, _AFTER_CHECKSUM = bytes(_BLANK[SIZE.stop : CHECKSUM.start]), bytes(_BLANK[CHECKSUM.stop :])


def tar_header(name: str, size: int) -> bytes:
    """As `made_by_the_library`."""
    if len(name) > 100 or not name.isascii() or size >= LARGEST:
        return made_by_the_library(name, size)
    field, digits = name.encode(), b"%011o\0" % size
    checksum = b"%06o\0 " % (_SUM + sum(field) + sum(digits))
    return b"".join((field, _AFTER_NAME[len(field) :], digits, _TIME, checksum, _AFTER_CHECKSUM))
