"""What is answered at which address: the page, what it shows of the release, and pictures.

Pictures come as a stream of JSON lines, so that each is there as soon as it is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import PurePath
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dalle_dist.config import SamplingConfig
from dalle_dist.config.root import keys_of
from dalle_dist.generate.generator import Generator
from dalle_dist.serve.form import Asked, asked, options_of
from dalle_dist.serve.guard import Guard
from dalle_dist.serve.limits import MOST_SEED, Limits, Refusal
from dalle_dist.serve.line import Event, Line, Ticket

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/canvas.js": ("canvas.js", "text/javascript"),
}
STILL_THERE = 10.0  # seconds


def application(
    generator: Generator, line: Line, limits: Limits, release: str, host: str
) -> ASGIApp:
    """The whole server; someone else serves the line."""
    server = _Server(generator, line, limits, release)
    routes = [_file(path, *file) for path, file in FILES.items()]
    routes.append(Route("/api/release", server.describe))
    routes.append(Route("/api/images", server.images, methods=["POST"]))
    handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _no_such_address}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host)


class _Server:
    def __init__(self, generator: Generator, line: Line, limits: Limits, release: str) -> None:
        self._generator, self._line, self._limits = generator, line, limits
        self._release = release
        self._decoding = asyncio.Lock()

    async def describe(self, _: Request) -> Response:
        tokenizer, defaults = self._generator.image_tokenizer, self._generator.config.sampling
        return JSONResponse(
            {
                "name": PurePath(self._release).as_posix(),
                "fingerprint": self._generator.fingerprint,
                "image_size": tokenizer.image_size,
                "grid": tokenizer.grid,
                "sampling": [_setting(key, defaults) for key in keys_of(SamplingConfig)],
                "most_images": self._limits.images,
                "most_bytes": self._limits.body,
                "most_prompt": self._limits.prompt,
                "most_seed": MOST_SEED,
            }
        )

    async def images(self, request: Request) -> Response:
        """Before the first event everything is checked that can be without the model."""
        self._line.check_place()
        body = await _body(request, self._limits)
        # One at a time: a decoded image may have a hundred times the bytes of its file.
        async with self._decoding:
            wanted = await asyncio.to_thread(asked, body, self._generator, self._limits)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended before the worker
                loop.call_soon_threadsafe(events.put_nowait, event)

        tell({"command": self._command(wanted)})
        ticket = Ticket(wanted, tell)
        self._line.enter(ticket)
        return _Stream(self._line, ticket, events)

    def _command(self, wanted: Asked) -> str:
        verb, image = ("generate", []) if wanted.completion is None else ("complete", ["image.png"])
        options = options_of(wanted, self._generator)
        words = [self._release, *image, wanted.prompt]
        # A prompt that looks like an option must stand behind "--", and so must all before it.
        dashes = any(word.startswith("-") for word in words)
        ordered = [*options, "--", *words] if dashes else [*words, *options]
        return shlex.join(["dalle-dist", verb, *ordered])


class _Stream(StreamingResponse):
    """The events of a ticket, which leaves the line with its client."""

    def __init__(self, line: Line, ticket: Ticket, events: asyncio.Queue[Event]) -> None:
        super().__init__(_lines(events), media_type="application/x-ndjson")
        self._line, self._ticket = line, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._line.leave(self._ticket)


async def _lines(events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    event: Event = {}
    while not event.keys() & {"done", "error"}:
        try:
            event = await asyncio.wait_for(events.get(), STILL_THERE)
        except asyncio.TimeoutError:
            # Of a client that went without a word only sending finds out.
            yield b"\n"
            continue
        yield json.dumps(event).encode() + b"\n"


async def _body(request: Request, limits: Limits) -> bytes:
    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limits.body:
                raise too_large
        return b"".join(parts)

    too_large = Refusal(413, f"the request has more than {limits.body / 2**20:g} MB")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > limits.body:
        raise too_large
    try:
        return await asyncio.wait_for(read(), limits.seconds)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the request took more than {limits.seconds:g} s to arrive") from None
    except ClientDisconnect:
        raise Refusal(400, "the client has gone") from None


def _setting(key: Any, defaults: SamplingConfig) -> dict[str, Any]:
    """What the page needs for one sampling option's field."""
    name, kind, meaning = key
    return {
        "name": name,
        "default": getattr(defaults, name),
        "choices": list(get_args(kind)),
        "whole": kind is int,
        "meaning": meaning.description,
        "least": meaning.at_least if meaning.at_least is not None else meaning.above,
        "most": meaning.at_most if meaning.at_most is not None else meaning.below,
    }


def _file(path: str, name: str, kind: str) -> Route:
    content = resources.files("dalle_dist.serve").joinpath("page", name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(path, answer)


async def _refused(_: Request, refusal: Refusal) -> Response:
    # A body may be left unread; nobody shall wait for it.
    return JSONResponse({"error": str(refusal)}, refusal.status, headers={"Connection": "close"})


async def _no_such_address(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
