"""A proxy that stands before an S3 server and does what networks and stores do at their worst.

    with FaultyProxy(s3_server, Faults(seed=0, share=0.3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

`proxy.injected` counts faults by kind, `proxy.requests` requests by method and path. Requests are
judged in their order of arrival, so that with threads a seed gives the mixture and not the order.
"""

import contextlib
import http.client
import http.server
import os
import random
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
}
OF_BODIES = ("reset", "truncated", "wrong", "stalled", "slow")


@dataclass
class Faults:
    """Which fault a request meets, drawn by chance.

    A storm is a 500 or 503 for several requests one after another. No request meets more than
    `in_a_row` faults, and no object is sent wrong more than `wrong_at_most` times: what is to be
    shown is that faults are survived, not how improbable it is to meet only faults.
    """

    seed: int
    share: float
    kinds: tuple[str, ...] = (*ERRORS, *OF_BODIES)
    storm: int = 3
    in_a_row: int = 3  # an attempt may be two requests, and there are 8 attempts
    wrong_at_most: int = 3

    def __post_init__(self):
        self._dice = random.Random(self.seed)
        self._row, self._wrong = Counter(), Counter()
        self._storm = ("", 0)

    def __call__(self, method: str, path: str, range_: str) -> str:
        """Kind of the fault; empty for none."""
        kind = self._drawn()
        # Bytes of objects alone can be compared with something; a listing's cannot.
        if kind == "wrong" and (not range_ or self._wrong[path] >= self.wrong_at_most):
            kind = ""
        if kind in OF_BODIES and method != "GET":
            kind = ""
        if self._row[method, path, range_] >= self.in_a_row:
            kind = ""
        self._row[method, path, range_] = self._row[method, path, range_] + 1 if kind else 0
        self._wrong[path] += kind == "wrong"
        return kind

    def _drawn(self):
        kind, left = self._storm
        if left:
            self._storm = (kind, left - 1)
            return kind
        if self._dice.random() >= self.share:
            return ""
        kind = self._dice.choice(self.kinds)
        if kind in ("500", "503"):
            self._storm = (kind, self._dice.randrange(self.storm))
        return kind


class FaultyProxy:
    """Listens on loopback while it is entered; `plan` says what a request meets.

    A plan takes method, path and Range header, and returns a kind of fault, "" for none, or a tuple
    (status, S3's error code) to answer with. `stall` is how many seconds a stalled body waits;
    `hold` is called with method and path before an answer, and may wait for something.
    """

    def __init__(
        self,
        upstream: str,
        plan: Callable[[str, str, str], object] = lambda *_: "",
        stall: float = 2.0,
        hold: Callable[[str, str], object] = lambda *_: None,
    ):
        self.upstream = urllib.parse.urlsplit(upstream)
        self.plan, self.stall, self.hold = plan, stall, hold
        self.injected, self.requests = Counter(), Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self):
        proxy = self

        class Handler(_Handler):
            of = proxy

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def gets(self, name: str) -> int:
        """Requests for the content of objects whose path ends so."""
        with self.lock:
            return sum(
                count
                for (method, path), count in self.requests.items()
                if method == "GET" and path.endswith(name)
            )

    def judge(self, method, path, range_):
        with self.lock:
            self.requests[method, urllib.parse.urlsplit(path).path] += 1
            fault = self.plan(method, path, range_)
            if fault:
                self.injected[fault if isinstance(fault, str) else fault[1]] += 1
            return fault


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: FaultyProxy

    def handle(self):
        with contextlib.suppress(OSError):  # clients go whenever they like
            super().handle()

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.of.judge(self.command, self.path, self.headers.get("Range", ""))
        self.of.hold(self.command, self.path)
        if not isinstance(fault, str) or fault in ERRORS:
            self._refuse(*(ERRORS[fault] if isinstance(fault, str) else fault))
            return
        answer, data = self._forward(body)
        try:
            getattr(self, f"_{fault or 'faithful'}")(answer, data)
        except OSError:
            self.close_connection = True  # the client went

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self, body):
        up = http.client.HTTPConnection(self.of.upstream.hostname, self.of.upstream.port)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            up.request(self.command, self.path, body, headers)
            answer = up.getresponse()
            return answer, answer.read()
        finally:
            up.close()

    def _refuse(self, status, code):
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        data = b"" if self.command == "HEAD" else text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _head(self, answer, data):
        self.send_response_only(answer.status)
        dropped = ("connection", "transfer-encoding", "content-length")
        for name, value in answer.getheaders():
            if name.lower() not in dropped:
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _faithful(self, answer, data):
        self._head(answer, data)
        self.wfile.write(data)

    def _truncated(self, answer, data):
        self._head(answer, data)
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def _reset(self, answer, data):
        self._head(answer, data)
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # at once, with a reset in place of an end
        self.close_connection = True

    def _wrong(self, answer, data):
        at = len(data) // 2
        self._faithful(
            answer, data[:at] + bytes(b ^ 0x55 for b in data[at : at + 8]) + data[at + 8 :]
        )

    def _stalled(self, answer, data):
        self._head(answer, data)
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.of.closing.wait(self.of.stall)
        self.close_connection = True

    def _slow(self, answer, data):
        self._head(answer, data)
        step = -(-len(data) // 4) or 1
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            self.wfile.flush()
            self.of.closing.wait(0.02)
