"""`dalle-dist serve`; the web server and torch are imported when it is called."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import get_args

from dalle_dist.choices import GeneratePrecision
from dalle_dist.errors import UserError
from dalle_dist.serve.limits import Limits


def add_serve(verbs: argparse._SubParsersAction) -> None:
    text = "a local web page that generates images for prompts, and completes images"
    verb = verbs.add_parser("serve", help=text, description=text)
    verb.add_argument("release", metavar="RELEASE", help="a release folder, e.g. runs/demo/release")
    verb.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default 127.0.0.1, which only this machine reaches); there is "
        "no password",
    )
    verb.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    verb.add_argument(
        "--precision", choices=get_args(GeneratePrecision), default="fp32", help="default fp32"
    )
    limits = Limits()
    for name, default, meaning in (
        ("images", limits.images, "images of one request"),
        ("waiting", limits.waiting, "requests that may wait"),
        ("megabytes", limits.body >> 20, "megabytes of one request, with the image it brings"),
    ):
        help_ = f"most {meaning} (default {default})"
        verb.add_argument(f"--max-{name}", type=int, default=default, metavar="N", help=help_)
    verb.set_defaults(handler=_serve)


def _serve(options: argparse.Namespace) -> None:
    for name in ("images", "waiting", "megabytes"):
        value = getattr(options, f"max_{name}")
        if value < 1:
            raise UserError(f"--max-{name}: {value} is below 1")
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UserError("serve needs Starlette and uvicorn: pip install 'dalle-dist[serve]'")
    from dalle_dist.serve.server import serve

    limits = Limits(
        images=options.max_images, waiting=options.max_waiting, body=options.max_megabytes << 20
    )
    serve(options.release, options.host, options.port, options.precision, limits)
