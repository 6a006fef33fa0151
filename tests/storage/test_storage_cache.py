"""What the cache of remote objects promises, and what a remote folder of shards does."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
from faulty_proxy import FaultyProxy

from dalle_dist import storage
from dalle_dist.data.shards import ShardIndex, ShardSet, ShardWriter
from dalle_dist.errors import DataError
from dalle_dist.storage import cache


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


def test_remote_shards_read_as_local_ones(bucket, tmp_path, monkeypatch):
    folder = storage.join(bucket, "shards")
    _write(folder)
    _write(tmp_path / "s")
    assert ShardIndex.load(folder) == ShardIndex.load(str(tmp_path / "s"))
    remote, local = ShardSet(folder, "images"), ShardSet(str(tmp_path / "s"), "images")
    assert [remote.read(i) for i in range(7)] == [local.read(i) for i in range(7)]
    storage.write_bytes(storage.join(folder, "00002.tar"), b"cut")
    assert remote.read(6) == local.read(6), "the index is the authority, and its copy is there"
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / "another-node"))
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


def _known(data):
    return len(data), hashlib.sha256(data).hexdigest()


def _in_new_process(code, *arguments):
    command = [sys.executable, "-c", f"import sys; from dalle_dist import storage; {code}"]
    return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def _copies():
    return sorted(p.name.partition("-")[2] for p in storage.cache_folder().glob("objects/*/*"))


def _age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_two_processes_that_want_one_object_fetch_it_once(bucket, s3_server, monkeypatch):
    storage.write_bytes(f"{bucket}/x", b"data")
    asked, second = threading.Semaphore(0), threading.Event()

    def hold_the_first(method, path):
        """Until both want it, and a second answer would be asked for if it were going to be."""
        if method == "HEAD":
            asked.release()
        elif proxy.gets("x") > 1:
            second.set()
        else:
            assert asked.acquire(timeout=30) and asked.acquire(timeout=30)
            second.wait(0.5)

    with FaultyProxy(s3_server, hold=hold_the_first) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        code = "print(storage.read_bytes(sys.argv[1]).decode())"
        processes = [_in_new_process(code, f"{bucket}/x") for _ in range(2)]
        assert [p.communicate(timeout=60)[0] for p in processes] == ["data\n"] * 2
        assert proxy.gets("x") == 1


def test_a_file_system_without_locks_is_no_error(bucket, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", none)
    storage.write_bytes(f"{bucket}/x", b"data")
    assert storage.read_bytes(f"{bucket}/x") == b"data"


def test_a_new_process_fetches_a_damaged_copy_again(bucket):
    path, data = f"{bucket}/x", b"right"
    storage.write_bytes(path, data)
    copy = storage.fetch(path, *_known(data))
    copy.write_bytes(b"wrong")
    code = "print(storage.fetch(sys.argv[1], 5, sys.argv[2]).read_bytes().decode())"
    process = _in_new_process(code, path, _known(data)[1])
    assert process.communicate(timeout=60)[0] == "right\n"
    assert copy.read_bytes() == data


def test_the_copies_used_longest_ago_go_when_the_budget_is_full(bucket, monkeypatch):
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "35")
    for name in "abcd":
        storage.write_bytes(f"{bucket}/{name}", name.encode() * 10)
    held = {name: storage.fetch(f"{bucket}/{name}") for name in "abc"}
    for age, name in enumerate("abc"):
        _age(held[name], 1000 - age)
    storage.fetch(f"{bucket}/a")  # now b is the one used longest ago
    with held["b"].open("rb") as open_file:
        storage.fetch(f"{bucket}/d")
        assert _copies() == ["a", "c", "d"]
        assert open_file.read() == b"b" * 10, "an open file outlives its name"
    assert storage.read_bytes(f"{bucket}/b") == b"b" * 10


def test_a_copy_in_use_goes_only_if_the_budget_is_impossible_without_it(bucket, monkeypatch):
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "25")
    for name in "abcd":
        storage.write_bytes(f"{bucket}/{name}", name.encode() * 10)
    first = [storage.fetch(f"{bucket}/{name}") for name in "ab"]
    _age(first[1], 3600)
    storage.fetch(f"{bucket}/c")
    assert _copies() == ["a", "c"], "a was used within the minute"
    storage.fetch(f"{bucket}/d")
    assert _copies() == ["c", "d"]
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "5")
    storage.write_bytes(f"{bucket}/e", b"e" * 10)
    assert storage.fetch(f"{bucket}/e").read_bytes() == b"e" * 10
    assert _copies() == ["e"], "what was asked for is there, however small the budget"


def test_the_budget_holds_for_processes_together(bucket, monkeypatch):
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "45")
    for name in "abcdefgh":
        storage.write_bytes(f"{bucket}/{name}", name.encode() * 10)
    code = "[storage.fetch(sys.argv[1] + '/' + name) for name in sys.argv[2]]"
    processes = [_in_new_process(code, bucket, names) for names in ("abcd", "efgh")]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    assert len(_copies()) == 4


def test_what_killed_processes_left_goes_after_a_day(bucket, monkeypatch):
    storage.write_bytes(f"{bucket}/f/x", b"data")
    copy = storage.fetch(f"{bucket}/f/x")
    old, new = copy.with_name(".part-old"), copy.with_name(".part-new")
    for file in (old, new):
        file.write_bytes(b"half")
    code = "import os; storage.fetch_folder(sys.argv[1]); os._exit(0)"
    assert _in_new_process(code, f"{bucket}/f").wait(timeout=60) == 0
    mine = storage.fetch_folder(f"{bucket}/f")
    folders = storage.cache_folder() / "folders"
    locks = list(folders.glob("*.lock"))
    for file in (old, *locks):
        _age(file, 2 * 24 * 3600)
    assert len(locks) == 2
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "1")
    storage.write_bytes(f"{bucket}/y", b"y")
    storage.fetch(f"{bucket}/y")
    assert not old.exists() and new.exists()
    assert [p for p in folders.iterdir() if p.is_dir()] == [mine]
    assert (mine / "x").read_bytes() == b"data", "an eviction takes nothing from a folder in use"


def test_a_process_takes_its_folders_along_when_it_ends(bucket):
    storage.write_bytes(f"{bucket}/f/x", b"data")
    code = "print((storage.fetch_folder(sys.argv[1]) / 'x').read_text())"
    assert _in_new_process(code, f"{bucket}/f").communicate(timeout=60)[0] == "data\n"
    assert not list((storage.cache_folder() / "folders").iterdir())


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "")
    monkeypatch.setenv("DALLE_DIST_CACHE", "")
    assert storage.cache_folder() == tmp_path / ".cache/dalle-dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert storage.cache_folder() == tmp_path / "xdg/dalle-dist"
    storage.configure("~/mine", 7)
    assert storage.cache_folder() == tmp_path / "mine"
    code = "from dalle_dist.storage import cache; print(storage.cache_folder(), cache.budget())"
    said = _in_new_process(code).communicate(timeout=60)[0]
    assert said == f"{tmp_path}/mine 7\n", "processes started from here have the same"
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "much")
    with pytest.raises(DataError, match="DALLE_DIST_CACHE_BYTES=much"):
        cache.budget()


def test_a_very_long_key_has_a_copy(bucket):
    name = "é" * 200 + ".txt"
    storage.write_bytes(f"{bucket}/{name}", b"data")
    assert storage.fetch(f"{bucket}/{name}").name.endswith("é.txt")


def test_shards_are_read_whatever_the_cache_deletes(bucket, monkeypatch):
    folder = storage.join(bucket, "shards")
    _write(folder)
    shards = ShardSet(folder, "images")
    monkeypatch.setenv("DALLE_DIST_CACHE_BYTES", "1")  # each shard drives out the one before
    for _ in range(2):
        assert [shards.read(i)["txt"] for i in range(7)] == [
            f"number {i}".encode() for i in range(7)
        ]
    assert len([name for name in _copies() if name.endswith(".tar")]) == 1


def _fetch_in_child(path, queue):
    queue.put(storage.read_bytes(path))


def test_a_forked_process_has_connections_of_its_own(bucket):
    for name in "ab":
        storage.write_bytes(f"{bucket}/{name}", name.encode())
    assert storage.read_bytes(f"{bucket}/a") == b"a"
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_fetch_in_child, args=(f"{bucket}/b", queue))
    child.start()
    assert queue.get(timeout=60) == b"b"
    child.join(60)
    assert storage.read_bytes(f"{bucket}/b") == b"b"
