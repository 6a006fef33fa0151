"""What the cache of remote objects promises, and what a remote folder of shards does."""

import pytest

from dalle_dist import storage
from dalle_dist.data.shards import ShardIndex, ShardSet, ShardWriter
from dalle_dist.errors import DataError


def _write(folder, count=7, samples_per_shard=3):
    with ShardWriter(str(folder), "images", {}, samples_per_shard) as writer:
        for i in range(count):
            writer.write(f"{i:04d}", {"png": bytes([i]) * (i + 1), "txt": f"number {i}".encode()})


def test_the_cache_is_used_until_the_object_changes(bucket):
    path = storage.join(bucket, "object")
    storage.write_bytes(path, b"first")
    storage.fetch(path).write_bytes(b"CACHE")
    assert storage.read_bytes(path) == b"CACHE"
    storage.write_bytes(path, b"other")
    assert storage.read_bytes(path) == b"other"


def test_a_truncated_copy_in_the_cache_is_fetched_again(bucket):
    path = storage.join(bucket, "object")
    storage.write_bytes(path, b"whole")
    storage.fetch(path).write_bytes(b"wh")
    assert storage.read_bytes(path) == b"whole"


def test_a_folder_is_fetched_under_its_own_names_and_anew(bucket):
    folder = storage.join(bucket, "folder")
    storage.write_bytes(storage.join(folder, "a", "b.txt"), b"b")
    storage.write_bytes(storage.join(folder, "c.txt"), b"c")
    first = storage.fetch_folder(folder)
    assert {n: (first / n).read_bytes() for n in storage.list_files(str(first))} == {
        "a/b.txt": b"b",
        "c.txt": b"c",
    }
    storage.remove(storage.join(folder, "c.txt"))
    assert storage.list_files(str(storage.fetch_folder(folder))) == ["a/b.txt"]
    with pytest.raises(DataError, match="nothing-here: no such folder"):
        storage.fetch_folder(storage.join(bucket, "nothing-here"))


def test_an_absent_bucket_and_a_path_without_one_are_one_line(bucket):
    with pytest.raises(DataError, match="no-such-bucket-here") as error:
        storage.write_bytes("s3://no-such-bucket-here/key", b"data")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no bucket"):
        storage.exists("s3://")


def test_remote_shards_read_as_local_ones(bucket, tmp_path):
    folder = storage.join(bucket, "shards")
    _write(folder)
    _write(tmp_path / "s")
    assert ShardIndex.load(folder) == ShardIndex.load(str(tmp_path / "s"))
    remote, local = ShardSet(folder, "images"), ShardSet(str(tmp_path / "s"), "images")
    assert [remote.read(i) for i in range(7)] == [local.read(i) for i in range(7)]
    storage.write_bytes(storage.join(folder, "00002.tar"), b"cut")
    with pytest.raises(DataError, match=r"00002\.tar: 3 bytes"):
        ShardSet(folder, "images").read(6)


def test_a_failed_remote_build_leaves_nothing_behind(bucket):
    folder = storage.join(bucket, "shards")
    with (
        pytest.raises(RuntimeError),
        ShardWriter(folder, "images", {}, samples_per_shard=1) as writer,
    ):
        writer.write("a", {"txt": b"a"})
        assert storage.list_files(folder) == ["00000.samples.parquet", "00000.tar"]
        raise RuntimeError("interrupted")
    assert storage.list_files(folder) == []
