"""`dalle-dist status`: torch is not imported for it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

LOCAL, REMOTE = 5.0, 30.0  # seconds between two looks
CLEAR = "\x1b[H\x1b[2J"


def add_status(verbs: argparse._SubParsersAction) -> None:
    text = "say how a run stands, while it runs or afterwards"
    verb = verbs.add_parser(
        "status",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Exit status 1: it has stalled or failed.",
    )
    verb.add_argument("run", metavar="RUN", help="folder of the run, local or remote")
    verb.add_argument("--follow", action="store_true", help="look again until the run ends")
    verb.add_argument("--json", action="store_true", help="for programs; one line for each look")
    verb.set_defaults(handler=_status)


def _status(options: argparse.Namespace) -> int:
    from dalle_dist.paths import is_remote
    from dalle_dist.watch.screen import screen
    from dalle_dist.watch.status import OVER, WRONG, status

    while True:
        found = status(options.run)
        if options.json:
            print(json.dumps(dataclasses.asdict(found)), flush=True)
        else:
            clear = CLEAR if options.follow and sys.stdout.isatty() else ""
            print(f"{clear}{screen(found)}", flush=True)
        if not options.follow or found.state in OVER:
            return int(found.state in WRONG)
        time.sleep(REMOTE if is_remote(options.run) else LOCAL)
