"""Which requests are answered at all, and the headers of every answer.

A page of another site can send requests to a server on this machine. It is told apart by `Origin`,
and, if it has its own name point to this machine (DNS rebinding), by `Host`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OF_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:/?#@\s]+)(:\d+)?")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Around an application, bound to `host`."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._names = {*OF_THIS_MACHINE, host.lower()}
        self._any_address = host in ANY_ADDRESS
        if self._any_address:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            return
        reason = self._reason(scope["method"], Headers(scope=scope))
        app: ASGIApp = self._app
        if reason is not None:
            # What follows the headers stays unread.
            app = JSONResponse({"error": reason}, 403, headers={"Connection": "close"})
        await app(scope, receive, with_headers)

    def _reason(self, method: str, headers: Headers) -> str | None:
        """Why it is not answered."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return "this server is not called by that name; start it with --host NAME"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if method not in ("GET", "HEAD") and (foreign or site not in ("same-origin", "none")):
            return "requests from pages of other sites are refused"
        return None

    def _is_ours(self, host: str) -> bool:
        match = HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1].strip("[]")
        if name in self._names:
            return True
        # Nobody's name: what has no name cannot be made to point here.
        return self._any_address and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
