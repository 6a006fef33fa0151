"""Bytes of main memory that this process may still take: the machine's, or less by a cgroup."""

from __future__ import annotations

from pathlib import Path

PROC, MOUNT = Path("/proc"), Path("/sys/fs/cgroup")
# Of the two versions of cgroups: limit, use, and in memory.stat the files that can be dropped.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """In bytes; page cache that is not in use counts as available, as the kernel sees it."""
    (line,) = (
        line
        for line in (proc / "meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    return min([1024 * int(line.split()[1]), *_rooms(proc, mount)])


def _rooms(proc: Path, mount: Path) -> list[int]:
    """What is left under each limit of this process' groups and of those above them."""
    rooms = []
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            names = _V1 if controllers else _V2
            root = mount / controllers
            group = root / path.lstrip("/")
            # In a container the path is that of the host, and the mount is its own group.
            folders = [f for f in (group, *group.parents) if f.is_relative_to(root)]
            rooms += [room for f in folders if (room := _room(f, *names)) is not None]
    return rooms


def _room(folder: Path, limit: str, use: str, droppable: str) -> int | None:
    """None: no such group, or one without a limit."""
    try:
        most = int((folder / limit).read_text())
        used = int((folder / use).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, most - used + int(stat.get(droppable, 0)))
