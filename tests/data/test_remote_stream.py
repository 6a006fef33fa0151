"""Training data from an S3 server: each node fetches its part alone, and through any fault."""

import hashlib
import multiprocessing
import random
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from dalle_dist import storage
from dalle_dist.data.loader import batches
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardSet, ShardWriter
from dalle_dist.data.source import SampleSource

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))
from faulty_proxy import Faults, FaultyProxy

SHARDS, PER_SHARD = 208, 10
SAMPLES = SHARDS * PER_SHARD


def write(folder, shards=SHARDS):
    dice = random.Random(0)
    with ShardWriter(folder, "images", {}, samples_per_shard=PER_SHARD) as writer:
        for i in range(shards * PER_SHARD):
            writer.write(f"{i:05d}", {"png": dice.randbytes(1500), "txt": b"%d" % i})


class Hashes(Dataset):
    """Of each sample its key and a hash of all its bytes."""

    def __init__(self, folder, streams):
        sizes = ShardSet(folder, "images").sizes
        self.source = SampleSource(folder, "images", SampleOrder(0, sizes, streams, 2))
        self.notes, self.describe = self.source.notes, self.source.describe

    def __getitem__(self, position):
        files = self.source.read(self.source.reading(position))
        key = files["__key__"].decode()
        return key, hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()


def read(folder, samples, world=1, rank=0, streams=8, workers=0):
    stream = batches(
        Hashes(folder, streams), batch_size=16, micro_batch=16 // world, rank=rank, world=world,
        start=0, workers=workers, collate=list,
    )  # fmt: skip
    return [sample for _ in range(samples // 16) for sample in next(stream)]


def test_each_of_eight_nodes_fetches_an_eighth_of_the_set(
    bucket, s3_server, monkeypatch, tmp_path, hurried
):
    """And in the next epoch nothing, for a node keeps its share."""
    folder = f"{bucket}/set"
    write(folder)
    index = ShardSet(folder, "images").index
    total = index.shards.bytes
    with FaultyProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        seen = []
        for node in range(8):
            monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / f"node-{node}"))
            proxy.requests.clear()
            seen += as_a_node(folder, SAMPLES, node)
            assert fetched(tmp_path / f"node-{node}") <= total / 8 * 1.05
            got = [path for method, path in proxy.requests.elements() if method == "GET"]
            tars = [path for path in got if path.endswith(".tar")]
            assert len(tars) == len(set(tars)), "no shard is fetched twice"
            proxy.requests.clear()
            as_a_node(folder, 2 * SAMPLES, node)
            assert not [path for _, path in proxy.requests if path.endswith(".tar")]
        assert len(seen) == SAMPLES == len({key for key, _ in seen})


def as_a_node(folder, samples, node):
    """Its samples, read by a process that takes what it still prefetches with it when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(read, folder, samples, 8, node, 64).result()


def fetched(cache):
    """Bytes of tars in a cache."""
    return sum(path.stat().st_size for path in cache.glob("objects/*/*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_window_is_fetched_before_it_is_read(bucket, s3_server, monkeypatch, workers):
    """Once the first windows are read, no sample waits for a request that it causes itself."""
    folder = f"{bucket}/set"
    write(folder, shards=16)
    stream = batches(
        Hashes(folder, 2), batch_size=16, micro_batch=16, rank=0, world=1, start=0,
        workers=workers, collate=list,
    )  # fmt: skip
    next(stream)
    # Two streams, each with a window of two shards that is read and one that will be.
    until = time.monotonic() + 20
    while len(copies()) < 8 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(copies()) == 8


def copies():
    return list(storage.cache_folder().glob("objects/*/*.tar"))


@pytest.mark.slow
def test_a_thousand_faults_change_neither_order_nor_bytes(
    bucket, s3_server, monkeypatch, tmp_path, hurried, capfd
):
    """Errors and storms of them, resets, truncated, wrong and stalled bodies, dead credentials."""
    write(f"{bucket}/set", shards=60)
    write(str(tmp_path / "local"), shards=60)
    samples = 60 * PER_SHARD // 16 * 16
    wanted = read(str(tmp_path / "local"), samples)
    monkeypatch.setattr(hurried, "read_part", 6_000)
    monkeypatch.setattr(hurried, "read_timeout", 1.0)
    met = 0
    for node in range(12):
        with FaultyProxy(s3_server, Faults(seed=node, share=0.35), stall=5) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / "cache"))
            assert read(f"{bucket}/set", samples, workers=2) == wanted
        met += sum(proxy.injected.values())
        shutil.rmtree(tmp_path / "cache")
        if met >= 1000:
            break
    assert met >= 1000
