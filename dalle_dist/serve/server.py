"""The socket, the model, the start and the end of `dalle-dist serve`."""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings

import uvicorn
from starlette.types import ASGIApp

from dalle_dist.choices import GeneratePrecision
from dalle_dist.errors import UserError
from dalle_dist.generate.generator import Generator
from dalle_dist.serve import worker
from dalle_dist.serve.app import application
from dalle_dist.serve.guard import OF_THIS_MACHINE
from dalle_dist.serve.limits import Limits
from dalle_dist.serve.line import Line

MOST_CONNECTIONS = 64  # beside those that wait in the line
SECONDS_TO_END = 5


def serve(release: str, host: str, port: int, precision: GeneratePrecision, limits: Limits) -> None:
    """Load a release and serve its page until a signal ends it, which is raised again.

    Raises:
        UserError: the address cannot be had, or as `Generator.load`.
    """
    with listen(host, port) as listening:
        generator = Generator.load(release, precision=precision)
        line = Line(limits.waiting)
        app = application(generator, line, limits, release, host)
        _tell(host, listening.getsockname()[1])
        with warnings.catch_warnings():
            # The page tells of them. They quote the client, whose text could steer a terminal, and
            # Python keeps each that it has shown.
            warnings.simplefilter("ignore")
            _run(uvicorn_config(app, limits.waiting), generator, line, listening)


def _run(
    config: uvicorn.Config, generator: Generator, line: Line, listening: socket.socket
) -> None:
    thread = worker.start(generator, line)
    try:
        EndingServer(config, line).run(sockets=[listening])
    finally:
        line.close()
        thread.join(SECONDS_TO_END)


def listen(host: str, port: int) -> socket.socket:
    """A socket that others can reach; before the model is read, so that a taken port is told soon.

    Raises:
        UserError: the port is in use, or the host is not an address of this machine.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port: {port} is not in 0 to {2**16 - 1}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host: {host!r} is no address of this machine") from None
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    # Connections of a server that has just ended would keep the port for a minute.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(MOST_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise _cannot_listen(host, port, error) from None
    return listening


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port: {port} is in use; choose another, 0 for any that is free")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"--host: {host!r} is no address of this machine")
    return UserError(f"--port: {port} of {host}: {os.strerror(error.errno or 0)}")


def _tell(host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}/ is ready; Ctrl-C ends it", flush=True)
    if host not in OF_THIS_MACHINE:
        text = f"Everyone who reaches {host} can use it: there is no password."
        print(text, file=sys.stderr, flush=True)


def uvicorn_config(app: ASGIApp, waiting: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS + waiting,
        timeout_graceful_shutdown=SECONDS_TO_END,
    )


class EndingServer(uvicorn.Server):
    """Ends the streams first, which would else be waited for."""

    def __init__(self, config: uvicorn.Config, line: Line) -> None:
        super().__init__(config)
        self._line = line

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._line.close()
        await super().shutdown(sockets)
