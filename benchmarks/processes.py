"""Work in processes of its own, so that nothing is known from a round before, and a store on S3."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import boto3

_fork = multiprocessing.get_context("fork")
BUCKET = "benchmark"


def apart(work: Callable[[], Any], core: int | None = None) -> Any:
    """What `work` returns in a forked process, on one core if one is named."""
    return together([work], core)[0]


def together(works: Sequence[Callable[[], Any]], core: int | None = None) -> list[Any]:
    """As `apart`, all at a time. Raises SystemExit when one of them fails."""
    started = []
    for work in works:
        receiving, sending = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_run, args=(work, core, sending))
        process.start()
        sending.close()
        started.append((process, receiving))
    results = []
    for process, receiving in started:
        with contextlib.suppress(EOFError):
            results.append(receiving.recv())
        process.join()
    if len(results) < len(works):
        raise SystemExit("a process of the benchmark ended without a result")
    return results


def _run(work: Callable[[], Any], core: int | None, sending: Connection) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    atexit._clear()  # what the parent does at its end
    try:
        sending.send(work())
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # of shared memory; multiprocessing leaves them out
    sending.close()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A store with an empty bucket, in a process of its own; URL of the bucket.

    The environment says where it is to all who read by boto3.
    """
    receiving, sending = _fork.Pipe(duplex=False)
    server = _fork.Process(target=_serve, args=(sending,), daemon=True)
    server.start()
    url = receiving.recv()
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "benchmark")
    os.environ |= keys | {
        "AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    try:
        apart(_make_bucket)
        yield f"s3://{BUCKET}"
    finally:
        server.terminate()
        server.join()


def _serve(sending: Connection) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    sending.send(f"http://{host}:{port}")
    server._thread.join()


def _make_bucket() -> None:
    boto3.client("s3").create_bucket(Bucket=BUCKET)


def signed_urls(names: Sequence[str]) -> list[str]:
    """By which any HTTP client reads these objects."""
    client = boto3.client("s3")
    objects = [{"Bucket": BUCKET, "Key": name} for name in names]
    return [client.generate_presigned_url("get_object", Params=o) for o in objects]
