"""Paths of all kinds; S3 is moto's HTTP server on loopback, spoken to by boto3."""

import errno
import os

import pytest
from faulty_proxy import FaultyProxy

from dalle_dist import storage
from dalle_dist.errors import DataError


@pytest.fixture(params=["local", "file", "s3", "memory"])
def root(request, tmp_path):
    if request.param == "s3":
        return storage.join(request.getfixturevalue("bucket"), "prefix")
    kinds = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory:/{tmp_path}"}
    return kinds[request.param]


def test_what_is_written_is_read(root):
    path = storage.join(root, "a", "b.txt")
    assert not storage.exists(path)
    storage.write_bytes(path, b"one")
    assert storage.exists(path) and storage.read_bytes(path) == b"one"
    storage.write_bytes(path, b"two")
    assert storage.read_bytes(path) == b"two", "a changed object must be fetched again"
    storage.write_bytes(storage.join(root, "c.txt"), b"")
    assert storage.read_bytes(storage.join(root, "c.txt")) == b""
    assert storage.list_files(root) == ["a/b.txt", "c.txt"]
    folder = storage.fetch_folder(root, (".txt",))
    assert [(folder / n).read_bytes() for n in ("a/b.txt", "c.txt")] == [b"two", b""]
    storage.remove(path)
    storage.remove(path)
    assert storage.list_files(root) == ["c.txt"]


def test_missing_is_said(root):
    absent = storage.join(root, "absent")
    with pytest.raises(DataError, match="absent: no such"):
        storage.read_bytes(absent)
    with pytest.raises(DataError, match="absent: no such folder"):
        storage.fetch_folder(absent)
    assert storage.list_files(absent) == [] and not storage.exists(absent)


def test_publish_moves_the_file(root, tmp_path):
    local = tmp_path / "staged"
    local.write_bytes(b"shard")
    storage.publish(local, storage.join(root, "shards", "00000.tar"))
    assert storage.read_bytes(storage.join(root, "shards", "00000.tar")) == b"shard"
    assert not local.exists()


def test_folder_is_uploaded_once_and_what_counts_comes_last(
    bucket, s3_server, tmp_path, monkeypatch
):
    folder, order = tmp_path / "run", []
    for name in ("index.json", "z.bin", "sub/config.yaml", ".lock"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)

    def note(method, path, _):
        if method == "PUT":
            order.append(path.partition("/run/")[2])
        return ""

    with FaultyProxy(s3_server, note) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.publish_folder(folder, f"{bucket}/run")
        assert order == ["z.bin", "index.json", "sub/config.yaml"]
        storage.publish_folder(folder, f"{bucket}/run")
        assert len(order) == 3, "unchanged files go up once"
        (folder / "z.bin").unlink()
        storage.publish_folder(folder, f"{bucket}/run")
        assert storage.list_files(f"{bucket}/run") == ["index.json", "sub/config.yaml"]


def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full; free some space"):
        storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_local_file_is_compared_with_what_is_known_of_it(tmp_path):
    path, right = (
        tmp_path / "shard",
        "81b637d8fcd2c6da6359e6963113a1170de795e4b725b84d1e0b4cfd9ec58ce9",
    )
    path.write_bytes(b"bob")
    assert storage.fetch(str(path), 3, right) == path
    with pytest.raises(DataError, match="shard: 3 bytes, the index says 4"):
        storage.fetch(str(path), 4, right)
    path.write_bytes(b"bib")
    os.utime(path, ns=(0, 0))  # another time than that of the file compared before
    with pytest.raises(DataError, match="shard: sha256 differs from the index"):
        storage.fetch(str(path), 3, right)
