"""What a user can put right about a remote store is one line with the fix."""

import pytest
from faulty_proxy import FaultyProxy

from dalle_dist import storage
from dalle_dist.errors import DataError


def assert_one_line(use, *words):
    with pytest.raises(DataError) as caught:
        use()
    said = str(caught.value)
    assert "\n" not in said and "s3://" in said
    assert all(word in said for word in words), said


def _fetch(path="s3://bucket/x"):
    return lambda: storage.fetch(path)


def test_no_credentials(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert_one_line(_fetch(), "no AWS credentials", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")


def test_an_unknown_profile(bucket, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert_one_line(_fetch(), "nobody", "AWS_PROFILE")


def test_an_endpoint_without_a_scheme(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert_one_line(_fetch(), "localhost:9000", "http://")


def test_an_endpoint_that_does_not_answer(bucket, monkeypatch, hurried):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert_one_line(_fetch(), "http://127.0.0.1:9", "AWS_ENDPOINT_URL", "after 8 attempts")


def test_a_bucket_that_is_not_there(bucket):
    absent = "s3://no-such-bucket-here"
    for use in (
        _fetch(f"{absent}/x"),
        lambda: storage.write_bytes(f"{absent}/x", b"x"),
        lambda: storage.list_files(absent),
    ):
        assert_one_line(use, "there is no bucket no-such-bucket-here", "check the name")


def test_a_path_without_bucket_or_key(bucket):
    assert_one_line(lambda: storage.exists("s3://"), "no bucket", "s3://bucket/key")
    assert_one_line(_fetch(bucket), "no key", "s3://bucket/key")


@pytest.mark.parametrize(
    "answer, use, words",
    [
        ((403, "AccessDenied"), _fetch(), ("access denied", "s3:GetObject", "s3:ListBucket")),
        ((403, "AccessDenied"), lambda: storage.fetch("s3://b/x", 1, "0"), ("s3:GetObject",)),
        ((403, "AccessDenied"), lambda: storage.list_files("s3://b/x"), ("s3:ListBucket",)),
        ((403, "AccessDenied"), lambda: storage.write_bytes("s3://b/x", b""), ("s3:PutObject",)),
        ((403, "AccessDenied"), lambda: storage.remove("s3://b/x"), ("s3:DeleteObject",)),
        (
            (403, "SignatureDoesNotMatch"),
            lambda: storage.list_files("s3://b/x"),
            ("does not know these credentials", "AWS_SECRET_ACCESS_KEY"),
        ),
        ((403, "RequestTimeTooSkewed"), lambda: storage.list_files("s3://b/x"), ("clock",)),
        (
            (400, "IllegalLocationConstraintException"),
            lambda: storage.list_files("s3://b/x"),
            ("another region", "AWS_DEFAULT_REGION"),
        ),
        (
            (301, "PermanentRedirect"),
            lambda: storage.list_files("s3://b/x"),
            ("another region", "AWS_DEFAULT_REGION"),
        ),
        ((400, "ExpiredToken"), lambda: storage.list_files("s3://b/x"), ("expired", "renew")),
        ((405, "MethodNotAllowed"), lambda: storage.list_files("s3://b/x"), ("405",)),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) and isinstance(value[0], int) else "",
)
def test_what_the_store_refuses(bucket, s3_server, monkeypatch, hurried, answer, use, words):
    # botocore itself asks for the bucket's region by HEAD after a redirection.
    def plan(method, *_):
        return "" if answer[0] == 301 and method == "HEAD" else answer

    with FaultyProxy(s3_server, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert_one_line(use, *words)


def test_half_a_listing_is_asked_for_again(bucket, s3_server, monkeypatch, hurried):
    storage.write_bytes(f"{bucket}/x", b"x")
    answers = []

    def plan(method, _path, _range):
        answers.append("truncated" if not answers else "")
        return answers[-1]

    with FaultyProxy(s3_server, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert storage.list_files(bucket) == ["x"] and answers == ["truncated", ""]
