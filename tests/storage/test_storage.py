"""Paths of both kinds; S3 is moto's HTTP server on loopback, spoken to by boto3."""

import errno
import os
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from dalle_dist import storage
from dalle_dist.errors import DataError


@pytest.fixture
def bucket(monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    return storage.join(request.getfixturevalue("bucket"), "prefix")


def test_what_is_written_is_read(root):
    path = storage.join(root, "a", "b.txt")
    assert not storage.exists(path)
    storage.write_bytes(path, b"one")
    assert storage.exists(path) and storage.read_bytes(path) == b"one"
    storage.write_bytes(path, b"two")
    assert storage.read_bytes(path) == b"two", "a changed object must be fetched again"
    storage.write_bytes(storage.join(root, "c.txt"), b"")
    assert storage.list_files(root) == ["a/b.txt", "c.txt"]


def test_missing_is_said(root):
    with pytest.raises(DataError, match="no such"):
        storage.read_bytes(storage.join(root, "absent"))
    assert storage.list_files(storage.join(root, "absent")) == []


def test_publish_moves_the_file(root, tmp_path):
    local = tmp_path / "staged"
    local.write_bytes(b"shard")
    storage.publish(local, storage.join(root, "shards", "00000.tar"))
    assert storage.read_bytes(storage.join(root, "shards", "00000.tar")) == b"shard"
    assert not local.exists()


def test_second_read_comes_from_the_cache(bucket):
    storage.write_bytes(f"{bucket}/x", b"data")
    first = storage.fetch(f"{bucket}/x")
    before = first.stat().st_mtime_ns
    assert storage.fetch(f"{bucket}/x") == first and first.stat().st_mtime_ns == before


def test_truncated_arrival_is_noticed_and_leaves_nothing(bucket, monkeypatch):
    storage.write_bytes(f"{bucket}/cut", b"data")
    client = storage._client()
    monkeypatch.setattr(
        client, "download_file", lambda b, k, target: Path(target).write_bytes(b"da")
    )
    with pytest.raises(DataError, match="2 of 4 bytes arrived"):
        storage.fetch(f"{bucket}/cut")
    assert not list(storage.cache_folder().joinpath("objects").rglob("*cut*"))


def test_folder_is_uploaded_once_and_what_counts_comes_last(bucket, tmp_path):
    for name in ("index.json", "z.bin", "sub/config.yaml", ".lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    order = []
    client = storage._client()
    upload = client.upload_file
    client.upload_file = lambda file, b, key: (order.append(key), upload(file, b, key))
    try:
        storage.publish_folder(tmp_path, f"{bucket}/run")
        assert order == ["run/z.bin", "run/index.json", "run/sub/config.yaml"]
        storage.publish_folder(tmp_path, f"{bucket}/run")
        assert len(order) == 3, "unchanged files go up once"
        (tmp_path / "z.bin").unlink()
        storage.publish_folder(tmp_path, f"{bucket}/run")
    finally:
        client.upload_file = upload
    assert storage.list_files(f"{bucket}/run") == ["index.json", "sub/config.yaml"]


def test_unreachable_server_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage, "RETRIES", {"max_attempts": 1})
    with pytest.raises(DataError) as caught:
        storage.read_bytes("s3://bucket/x")
    assert "s3://bucket/x" in str(caught.value) and "\n" not in str(caught.value)


def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full; free some space"):
        storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
