"""`python -m tests.checkpoint.killed_run PHASE SAVE CONFIG`: a run of stage 2 that kills itself.

The launcher and all ranks get SIGKILL when rank 0 is through PHASE of its SAVE-th save, counted
from 1, the trial save of the start. "none": they get none.
"""

import os
import signal
import sys
from collections import Counter
from pathlib import Path

from dalle_dist.checkpoint import store
from dalle_dist.config import load
from dalle_dist.distributed import process_group
from dalle_dist.train.transformer import train

PHASE, SAVE, CONFIG = sys.argv[1:]
seen = Counter()


def phase(name):
    seen[name] += 1
    if (name, seen[name]) == (PHASE, int(SAVE)) and os.environ.get("RANK", "0") == "0":
        launcher = os.getppid()
        ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for pid in (launcher, *map(int, ranks)):
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    store.phase = phase
    train(load(CONFIG, []), "auto")
    process_group.leave(0)
