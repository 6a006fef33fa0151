"""S3 by boto3, which finds endpoint, region, profile and credentials as every AWS tool does.

Bodies go up plainly, with a Content-Length: newer botocore otherwise frames them with a checksum
behind (aws-chunked), which some stores keep as content. `upload.py` verifies what arrived.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dalle_dist.errors import DataError
from dalle_dist.storage import retry
from dalle_dist.storage.retry import ObjectChanged, PassingTrouble
from dalle_dist.storage.s3_errors import conditional, translated
from dalle_dist.storage.settings import SETTINGS
from dalle_dist.storage.store import Content, NoConditions, Page, Part, Stat

MOST_PARTS = 10_000  # of one upload
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class S3Store:
    """`Store` of paths `s3://bucket/key`."""

    def stat(self, path: str) -> Stat | None:
        from botocore.exceptions import ClientError

        bucket, key = _object(path)
        with _requests(path) as client:
            try:
                head = client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
        return Stat(head["ContentLength"], head.get("ETag", ""), _md5(head))

    def read(self, path: str, start: int, end: int, version: str) -> Part:
        bucket, key = _object(path)
        same = {"IfMatch": version} if version else {}
        with _requests(path) as client:
            answer = client.get_object(
                Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **same
            )
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
        if version and answer.get("ETag", version) != version:
            raise ObjectChanged(path)
        if "ContentRange" not in answer:  # a store that knows no ranges sends all
            return Part(data[start:end], len(data))
        total = answer["ContentRange"].rpartition("/")[2]
        return Part(data, int(total) if total.isdigit() else None)

    def list_page(self, folder: str, after: str) -> Page:
        bucket, key = _split(folder)
        prefix = key.rstrip("/") + "/" if key else ""
        more = {"ContinuationToken": after} if after else {}
        with _requests(folder) as client:
            answer = client.list_objects_v2(Bucket=bucket, Prefix=prefix, **more)
        names = [entry["Key"][len(prefix) :] for entry in answer.get("Contents", [])]
        return Page(names, answer.get("NextContinuationToken", ""))

    def put(self, path: str, content: Content) -> str:
        if content.size > SETTINGS.write_part:
            return _put_parts(path, content)
        bucket, key = _object(path)
        data = content.read(0, content.size)
        digest = hashlib.md5(data, usedforsecurity=False)
        with _requests(path) as client:
            client.put_object(Bucket=bucket, Key=key, Body=data, ContentMD5=_base64(digest))
        return f'"{digest.hexdigest()}"'

    def put_if(self, path: str, data: bytes, version: str | None) -> str:
        bucket, key = _object(path)
        if version == "":
            raise NoConditions(f"{path}: the store gives objects no ETag")
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        digest = _base64(hashlib.md5(data, usedforsecurity=False))
        with _requests(path) as client, conditional(path):
            answer = client.put_object(
                Bucket=bucket, Key=key, Body=data, ContentMD5=digest, **condition
            )
        return str(answer.get("ETag", ""))

    def delete(self, path: str) -> None:
        bucket, key = _object(path)
        with _requests(path) as client:
            client.delete_object(Bucket=bucket, Key=key)

    def delete_if(self, path: str, version: str) -> None:
        bucket, key = _object(path)
        with _requests(path) as client, conditional(path):
            client.delete_object(Bucket=bucket, Key=key, IfMatch=version)


def _put_parts(path: str, content: Content) -> str:
    bucket, key = _object(path)
    size = max(SETTINGS.write_part, -(-content.size // MOST_PARTS))

    def begin() -> str:
        with _requests(path) as client:
            return str(client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"])

    upload = {"Bucket": bucket, "Key": key, "UploadId": retry.call(begin)}
    send = functools.partial(_put_part, path, content, size, upload)
    try:
        count = -(-content.size // size)
        with ThreadPoolExecutor(SETTINGS.threads) as pool:
            sent = list(pool.map(lambda number: retry.call(lambda: send(number)), range(count)))
        retry.call(lambda: _complete(path, upload, [part for part, _ in sent]))
    except BaseException:
        with contextlib.suppress(DataError, PassingTrouble), _requests(path) as client:
            client.abort_multipart_upload(**upload)
        raise
    together = hashlib.md5(b"".join(digest for _, digest in sent), usedforsecurity=False)
    return f'"{together.hexdigest()}-{count}"'


def _put_part(
    path: str, content: Content, size: int, upload: dict[str, str], number: int
) -> tuple[dict[str, Any], bytes]:
    """The part as the store wants it named at the end, and its MD5."""
    data = content.read(number * size, min((number + 1) * size, content.size))
    digest = hashlib.md5(data, usedforsecurity=False)
    with _requests(path) as client:
        answer = client.upload_part(
            **upload, PartNumber=number + 1, Body=data, ContentMD5=_base64(digest)
        )
    return {"PartNumber": number + 1, "ETag": answer["ETag"]}, digest.digest()


def _complete(path: str, upload: dict[str, str], parts: list[dict[str, Any]]) -> None:
    from botocore.exceptions import ClientError

    with _requests(path) as client:
        try:
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # An earlier attempt whose answer was lost may have ended it; verification tells.
            if error.response["Error"]["Code"] != "NoSuchUpload":
                raise


@contextlib.contextmanager
def _requests(path: str) -> Any:
    """A client for requests whose errors are translated; credentials that expired are dropped."""
    try:
        with translated(path):
            yield client()
    except PassingTrouble as trouble:
        if trouble.kind == "credentials":
            _client.cache_clear()
        raise


def client() -> Any:
    """This process's boto3 client for the environment as it is now."""
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    return _client(os.getpid(), environment, SETTINGS.connect_timeout, SETTINGS.read_timeout)


@functools.lru_cache(maxsize=4)
def _client(_process: int, _environment: Any, connect: float, read: float) -> Any:
    """One per process, since connections must not be shared over a fork."""
    import boto3
    from botocore.config import Config

    # A session of its own: the default one keeps credentials, and is not for several threads.
    return boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=connect,
            read_timeout=read,
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=32,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{path}: no bucket; write s3://bucket/key")
    return bucket, key


def _object(path: str) -> tuple[str, str]:
    bucket, key = _split(path)
    if not key:
        raise DataError(f"{path}: no key; write s3://bucket/key")
    return bucket, key


def _md5(head: dict[str, Any]) -> str:
    """An ETag is the content's MD5 unless the store encrypts under another's key."""
    found = _MD5.fullmatch(head.get("ETag", ""))
    encrypted = "SSECustomerAlgorithm" in head or "kms" in head.get("ServerSideEncryption", "")
    return found[1] if found and not encrypted else ""


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()
