"""Where a thread of this process is, in a few words, as another thread sees it."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = f"{Path(__file__).parents[1]}/"
OWN = f"{Path(__file__).parent}/"
# Where functions named all_reduce, broadcast and so on wait for the other ranks.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
# Of torch's wrappers around them, that only log.
_WRAPPERS = ("wrapper", "inner", "log_wrapper")
_WAITS = {
    ".wait(": "a collective that was begun before",
    ".item(": "the GPU",
    ".tolist(": "the GPU",
    ".cpu(": "the GPU",
    "synchronize(": "the GPU",
}


@dataclass(frozen=True)
class Place:
    """A line of this package, and what its thread waits for there.

    where       e.g. "data/loader.py:123 fetch"; "outside of dalle_dist" where no caller is in it
    collective  name of the collective function it is in; empty outside of any
    waits       what else a wait in this line is for, as far as its text says so; may be empty
    """

    where: str
    collective: str = ""
    waits: str = ""


def place_of(thread: int, on_gpu: bool = False) -> Place:
    """Of the thread with this identifier (`threading.get_ident`).

    A backward pass on GPUs calls Python in threads of its own: where one of them waits in a
    collective, while the given thread does not, the place is that thread's.
    """
    frames = sys._current_frames()
    place = _of_stack(frames.get(thread), on_gpu)
    if not place.collective and on_gpu:
        others = [_of_stack(frame, on_gpu) for key, frame in frames.items() if key != thread]
        place = next((other for other in others if other.collective), place)
    return place


def _of_stack(frame: FrameType | None, on_gpu: bool) -> Place:
    collective = ""
    for one in _outwards(frame):
        name = one.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(OWN):
            where = f"{name.removeprefix(ROOT)}:{one.f_lineno} {one.f_code.co_name}"
            return Place(where, collective, "" if collective else _waits(name, one, on_gpu))
        if not collective and any(part in name for part in _COLLECTIVES):
            called = one.f_code.co_name
            collective = "" if called in _WRAPPERS else called
    return Place("outside of dalle_dist", collective)


def _waits(name: str, frame: FrameType, on_gpu: bool) -> str:
    line = linecache.getline(name, frame.f_lineno)
    found = [what for call, what in _WAITS.items() if call in line]
    return found[0] if found and (on_gpu or found[0] != "the GPU") else ""


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
