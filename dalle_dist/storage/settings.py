"""How patient reading and writing of remote stores is, in one place."""

from __future__ import annotations

from dataclasses import dataclass

MiB = 1 << 20


@dataclass
class Settings:
    """Tests shrink these; times are in seconds, sizes in bytes."""

    attempts: int = 8  # of a request, and of an object whose body was wrong
    base: float = 0.2  # the first pause is at most this long, each later one twice the one before
    cap: float = 20.0
    connect_timeout: float = 10.0
    read_timeout: float = 30.0  # without a byte arriving
    threads: int = 4  # for one object
    read_part: int = 8 * MiB
    write_part: int = 32 * MiB
    sample: int = 64 << 10  # what is read back of both ends of an uploaded part


SETTINGS = Settings()
