"""`python -m tests.train.leased_run CONFIG SECONDS LOCKS`: a run of stage 2, gone on with.

Its lease lives so many seconds; with LOCKS "none" the file system has none.
"""

import errno
import fcntl
import functools
import sys

from dalle_dist.config import load
from dalle_dist.errors import UserError
from dalle_dist.train import loop
from dalle_dist.train.run import Run
from dalle_dist.train.transformer import train

CONFIG, SECONDS, LOCKS = sys.argv[1:]


def without_locks(*_):
    raise OSError(errno.ENOTSUP, "not here")


if __name__ == "__main__":
    loop.Run = functools.partial(Run, lease_seconds=float(SECONDS))
    if LOCKS == "none":
        fcntl.flock = without_locks
    try:
        train(load(CONFIG, []), "auto")
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
