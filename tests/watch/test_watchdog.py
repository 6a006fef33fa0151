"""The watchdog by itself: its message, and a rank that cannot talk to the others."""

import subprocess
import sys
import threading

import pytest

from dalle_dist.distributed import process_group
from dalle_dist.errors import HUNG
from dalle_dist.watch.place import Place, place_of
from dalle_dist.watch.verdict import SHOWN, Stuck, named, verdict

READING = Place("data/loader.py:123 fetch")
SENDING = Place("gradients/sending.py:88 flush", "all_reduce")
HOSTS = {rank: f"gpu{rank // 8:02}" for rank in range(16)}
ALONE = """
import sys, threading, time
from types import SimpleNamespace
from dalle_dist.config import WatchConfig
from dalle_dist.watch import watchdog

watchdog.GRACE, watchdog.POLL = 0.5, 0.05
real, looks = time.monotonic, iter(range(10**6))
if sys.argv[1] == "suspended":  # a day between any two looks at the clock
    clock = SimpleNamespace(monotonic=lambda: real() + 86400 * next(looks), sleep=time.sleep)
    watchdog.time = clock


class Silent:
    def posted(self, key):
        threading.Event().wait()


dog = watchdog.Watchdog(
    WatchConfig(hang_after=float(sys.argv[2]), hang_after_others=float(sys.argv[3])),
    1, ["n0", "n1"], Silent(), print,
)
for step in range(2):  # the first has the others' time
    dog.now("step", step)
threading.Event().wait(2)
sys.exit(3)
"""


def ended(*arguments):
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_the_message_begins_with_who_holds_up_the_others():
    found = {rank: Stuck(812, "step", SENDING) for rank in HOSTS}
    found[8] = Stuck(812, "step", READING)
    assert verdict(found, HOSTS, 600.4) == (
        "step 812 has made no progress for 600 s: "
        "rank 8 (host gpu01) is in data/loader.py:123 fetch, not in a collective; "
        "ranks 0-7, 9-15 wait in all_reduce (gradients/sending.py:88 flush)"
    )


def test_silent_ranks_come_first_and_other_steps_are_told():
    found = {rank: Stuck(812, "step", SENDING) for rank in range(14)}
    found[3] = Stuck(813, "step", Place("train/loop.py:1 f", waits="the GPU"))
    found[4] = Stuck(812, "saving", Place("checkpoint/save.py:1 f"))
    assert verdict(found, HOSTS, 5).partition(" s: ")[2].split("; ") == [
        "ranks 14-15 (host gpu01) do not answer (dead, stopped, starved or cut off)",
        "rank 3 (host gpu00) is in train/loop.py:1 f, at step 813, waits for the GPU",
        "rank 4 (host gpu00) is in checkpoint/save.py:1 f, saving, not in a collective",
        "ranks 0-2, 5-13 wait in all_reduce (gradients/sending.py:88 flush)",
    ]


def test_a_message_has_a_few_places_at_most():
    found = {rank: Stuck(1, "step", Place(f"a.py:{rank} f")) for rank in HOSTS}
    assert verdict(found, HOSTS, 5).endswith(f"; {len(HOSTS) - SHOWN} more places")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([5], "rank 5 (host gpu00)"), ([8, 9, 11], "ranks 8-9, 11 (host gpu01)"),
     ([0, 9], "ranks 0, 9")],
)  # fmt: skip
def test_ranks_are_named_with_their_host_where_they_have_one(ranks, text):
    assert named(ranks, HOSTS) == text


def test_a_thread_is_where_its_innermost_line_of_the_package_is():
    process_group.init()
    board, waiting = process_group.board("place"), threading.Event()

    def wait():
        waiting.set()
        board.await_all(["key"])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert waiting.wait(10)
    while "await_all" not in place_of(thread.ident).where:
        assert thread.is_alive()
    board.post("key", 1)
    thread.join(10)
    assert place_of(threading.get_ident()).where == "outside of dalle_dist"


def test_a_rank_that_cannot_talk_to_the_others_leaves_by_itself():
    code, said = ended("usual", 0.4, 0)
    assert code == HUNG
    assert "step 2 has made no progress for 1 s: rank 1 (host n1) is in outside" in said
    assert said.endswith("; the other ranks cannot be reached\n")


@pytest.mark.parametrize(
    "arguments",
    [("usual", 0, 0), ("usual", 60, 60), ("suspended", 60, 60), ("usual", 0, 60)],
)
def test_a_rank_whose_time_is_not_over_stays(arguments):
    assert ended(*arguments) == (3, "")
