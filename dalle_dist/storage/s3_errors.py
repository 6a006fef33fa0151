"""What botocore raises, as one line with the fix, or as trouble that may pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from dalle_dist.errors import DataError
from dalle_dist.storage.retry import ObjectChanged, PassingTrouble
from dalle_dist.storage.store import Conflict, NoConditions

_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests")
_BROKEN_BODY = ("RequestTimeout", "IncompleteBody", "BadDigest", "InternalError")
_ELSEWHERE = (
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
)
_UNKNOWN_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken")
_RIGHTS = {
    "HeadObject": "s3:GetObject, and s3:ListBucket to be told that an object is absent",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
}


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Raises DataError or PassingTrouble in place of what boto3 and its connections raise."""
    import urllib3.exceptions
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        raise _of_answer(path, error) from None
    except BotoCoreError as error:
        raise _of_botocore(path, error) from None
    except ResponseParserError as error:  # half of an answer's XML
        raise PassingTrouble("garbled", f"{path}: {_text(error)}") from None
    except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise PassingTrouble("connection", f"{path}: {_text(error)}") from None
    except ValueError as error:  # botocore has no class of its own for this one
        if "endpoint" not in str(error).lower():
            raise
        raise DataError(
            f"{path}: {_text(error)}; AWS_ENDPOINT_URL begins with http:// or https://"
        ) from None


@contextlib.contextmanager
def conditional(path: str) -> Iterator[None]:
    """Of a request with a condition: raises Conflict where it does not hold, or NoConditions."""
    from botocore.exceptions import ClientError, ParamValidationError

    try:
        yield
    except ParamValidationError:
        raise NoConditions(f"{path}: this boto3 knows no conditional writes; update it") from None
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        if status == 412 or code == "NoSuchKey":
            raise Conflict(path) from None
        if status == 409:  # S3 decides between two at once, and asks one to come again
            raise PassingTrouble("busy", f"{path}: another process writes it ({code})") from None
        if status == 501:
            raise NoConditions(f"{path}: the store has no conditional writes ({code})") from None
        raise


def _of_answer(path: str, error: Any) -> Exception:
    """A ClientError: the store answered, but not with what was asked for."""
    said, action = error.response.get("Error", {}), error.operation_name
    code = str(said.get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    # An answer to HEAD has no body, thus no code: 400 is what an expired token looks like there.
    if code in _EXPIRED or (code == "400" and action == "HeadObject"):
        return PassingTrouble("credentials", f"{path}: the credentials expired; renew them")
    if code in _BUSY or status == 429:
        return PassingTrouble("busy", f"{path}: the store is too busy ({code})")
    if code in _BROKEN_BODY or status >= 500:
        return PassingTrouble("server", f"{path}: the store failed ({status} {code})")
    if status == 412:
        return ObjectChanged(path)
    return DataError(f"{path}: {_final(path, code, status, action, said)}")


def _final(path: str, code: str, status: int, action: str, said: dict[str, Any]) -> str:
    bucket = path.split("/")[2]
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket}; make it, or check the name and AWS_ENDPOINT_URL"
    if code in _ELSEWHERE or status == 301:
        region = said.get("Region") or said.get("Endpoint") or "another region"
        return f"the bucket lies in {region}; set AWS_DEFAULT_REGION"
    if code == "RequestTimeTooSkewed":
        return "the store refuses this machine's time; set its clock"
    if code in _UNKNOWN_KEYS:
        return (
            f"the store does not know these credentials ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_PROFILE"
        )
    if status in (401, 403):
        right = _RIGHTS.get(action, "s3:PutObject")
        return f"access denied; these credentials need {right} on the bucket {bucket}"
    if status == 404:
        return "no such object"
    return f"the store refuses {action} ({status} {code}: {_text(said.get('Message', ''))})"


def _of_botocore(path: str, error: Any) -> Exception:
    """Whatever happened on this side or on the way."""
    from botocore import exceptions as e

    text = f"{path}: {_text(error)}"
    if isinstance(error, (e.NoCredentialsError, e.PartialCredentialsError)):
        return DataError(
            f"{path}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE"
        )
    if isinstance(error, e.ProfileNotFound):
        return DataError(f"{text}; check AWS_PROFILE")
    if isinstance(error, e.NoRegionError):
        return DataError(f"{path}: no region; set AWS_DEFAULT_REGION")
    if isinstance(error, e.SSLError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return DataError(f"{text}; AWS_CA_BUNDLE names the certificates to trust")
    for kind, classes in {
        "timeout": (e.ReadTimeoutError, e.ConnectTimeoutError),
        "truncated": (e.IncompleteReadError, e.ResponseStreamingError),
        "credentials": (e.CredentialRetrievalError, e.MetadataRetrievalError),
    }.items():
        if isinstance(error, classes):
            return PassingTrouble(kind, text)
    if isinstance(error, (e.HTTPClientError, e.ConnectionError)):
        where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        check = f"AWS_ENDPOINT_URL ({where})" if where else "the network"
        return PassingTrouble("connection", f"{text}; check {check}")
    return DataError(text)


def _text(error: Any) -> str:
    return " ".join(str(error).split())
