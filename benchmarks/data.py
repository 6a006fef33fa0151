"""Reading, resuming and building data: samples, seconds and memory, against rivals and floors.

    python -m benchmarks.data --rivals DIR     where mosaicml-streaming lies (data_tokens.py)

Everything is made from a seed in a temporary folder. Whoever reads does so in a forked process of
its own, so that each epoch is the first of its process: ours compares every shard's sha256 in it.
Tokens are read by one core. Before anything is timed, all readers must find the same samples. The
S3 is moto's, a process beside them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common, data_order, data_pictures, data_sets, data_tokens, processes
from benchmarks.common import Measured
from benchmarks.data_tokens import Reader
from dalle_dist import storage
from dalle_dist.text_tokenizer.bpe import train_tokenizer

ROOT = Path(__file__).parents[1]
VOCABULARY = 4_096
MEMORY_ROUNDS = 3
FULL, EMPTY = "ours, full cache", "ours, empty cache"
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Sizes:
    """Samples, pictures and shards of each part; whole batches of each."""

    tokens: int = 32_000
    samples_per_shard: int = 1_000
    jpegs: int = 8_192
    small_pngs: int = 10_000
    large_pngs: int = 2_000
    shards_to_resume: int = 100_000
    shards_to_hold: int = 250_000
    batches: int = 1_000


SMOKE = Sizes(256, 50, 64, 20, 10, 2_000, 2_000, 2)


@dataclass(frozen=True)
class Bench:
    """What a part of the benchmark is given; `streaming` is mosaicml-streaming, or None."""

    folder: Path
    sizes: Sizes
    rounds: int
    streaming: Any


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rivals", type=Path, help="a folder with mosaicml-streaming")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = common.arguments(__doc__, rounds=5, parents=[parser])
    sizes = SMOKE if options.smoke else Sizes()
    streaming = data_tokens.import_streaming(options.rivals)
    config = replace(common.benchmark_config(options.smoke), name=f"n{sizes.tokens}")
    for part in options.parts:
        with tempfile.TemporaryDirectory(prefix="dalle-dist-benchmark-") as folder:
            rows = PARTS[part](Bench(Path(folder), sizes, options.rounds, streaming))
        common.report("data", config, rows, options)


def tokens(bench: Bench) -> list[Measured]:
    """From the disk."""
    shards, files, mds = (bench.folder / name for name in ("shards", "files", "mds"))
    _write_shards(bench, shards)
    data_sets.write_token_files(files, bench.sizes.tokens)
    tokenizer = train_tokenizer(data_sets.captions(bench.sizes.tokens), VOCABULARY)
    readers = [
        data_tokens.ours(str(shards)),
        data_tokens.ours(str(shards), "ours, second epoch", epochs_before=1),
        *(data_tokens.ours_tokenized(str(shards), tokenizer, dropout) for dropout in (0.0, 0.1)),
        data_tokens.by_webdataset(_tars(shards)),
        data_tokens.by_files(files),
    ]
    if bench.streaming is not None:
        data_tokens.write_mds(bench.streaming, str(mds), bench.sizes.tokens)
        readers.append(data_tokens.by_streaming(bench.streaming, lambda: str(mds)))
    return speeds("tokens", bench.sizes.tokens, _checked_times(bench, readers))


def s3(bench: Bench) -> list[Measured]:
    """From a store on this machine: into a cache that is empty, and from one that is full."""
    shards, mds = bench.folder / "shards", bench.folder / "mds"
    os.environ["DALLE_DIST_CACHE"] = str(bench.folder / "cache")
    _write_shards(bench, shards)
    with processes.s3_server() as bucket:
        url = f"{bucket}/shards"
        processes.apart(lambda: storage.publish_folder(shards, url))
        urls = processes.signed_urls([f"shards/{Path(tar).name}" for tar in _tars(shards)])
        readers = [
            data_tokens.ours(str(shards)),
            data_tokens.ours(url, FULL),
            _with_empty_cache(bench, data_tokens.ours(url, EMPTY)),
            data_tokens.by_webdataset(urls, ", no cache"),
        ]
        if bench.streaming is not None:
            data_tokens.write_mds(bench.streaming, str(mds), bench.sizes.tokens)
            remote = f"{bucket}/mds"
            processes.apart(lambda: storage.publish_folder(mds, remote))
            readers.append(
                data_tokens.by_streaming(
                    bench.streaming, lambda: _new_folder(bench), remote, ", empty cache"
                )
            )
        times = _checked_times(bench, readers)
    rows = speeds("tokens from S3", bench.sizes.tokens, times, ours=EMPTY)
    local = ratios(times["ours"], times[FULL])
    return [*rows, Measured(FULL, "tokens from S3: speed / ours from the disk", "x", local)]


def _write_shards(bench: Bench, folder: Path) -> None:
    data_sets.write_token_shards(folder, bench.sizes.tokens, bench.sizes.samples_per_shard)


def _tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def _new_folder(bench: Bench) -> str:
    return tempfile.mkdtemp(dir=bench.folder)


def _with_empty_cache(bench: Bench, reader: Reader) -> Reader:
    def open_() -> Iterable[Any]:
        storage.configure(folder=_new_folder(bench))
        return reader.open()

    return replace(reader, open=open_)


def _checked_times(bench: Bench, readers: Sequence[Reader]) -> Times:
    check(readers)
    return _times(readers, bench.rounds, core=max(os.sched_getaffinity(0)))


def check(readers: Sequence[Reader]) -> None:
    """Raises SystemExit unless all find the same samples."""
    found = {
        reader.name: processes.apart(lambda reader=reader: data_tokens.digest(reader))
        for reader in readers
    }
    right = found[readers[0].name]
    for name, samples in found.items():
        if samples != right:
            raise SystemExit(f"data: {name}: other samples: {samples}, ours: {right}")


def _times(readers: Sequence[Reader], rounds: int, core: int | None = None) -> Times:
    def epoch(reader: Reader) -> float:
        batches = reader.open()
        return common.seconds(lambda: collections.deque(batches, maxlen=0))

    cases = {reader.name: partial(epoch, reader) for reader in readers}
    return common.interleaved(cases, rounds, lambda run: processes.apart(run, core))


def speeds(metric: str, count: int, times: Times, ours: str = "ours") -> list[Measured]:
    """Samples a second; of all but ours, how often ours is as quick."""
    rows = []
    for name, seconds in times.items():
        rows.append(Measured(name, metric, "samples/s", [count / t for t in seconds]))
        if name != ours:
            faster = ratios(seconds, times[ours])
            rows.append(Measured(name, f"{metric}: its time / {ours}", "x", faster))
    return rows


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def images(bench: Bench) -> list[Measured]:
    """JPEGs of about 320 x 256 to augmented batches at 256 x 256."""
    files, shards, count = bench.folder / "files", bench.folder / "shards", bench.sizes.jpegs
    data_sets.write_jpegs(files, count)
    data_sets.write_image_shards(shards, files, count // 16)

    def readers(augment: bool) -> list[Reader]:
        return [
            data_pictures.ours(str(shards), augment),
            data_pictures.by_webdataset(_tars(shards), augment),
            data_pictures.by_files(files, augment),
        ]

    check(readers(augment=False))
    data_pictures.require_same_cut(files, 256)
    pillow = [
        _decoding(files, "Pillow alone", data_pictures.paper_by_pillow),
        _decoding(files, "Pillow alone, our cut", data_pictures.PAPER),
    ]
    return speeds("images", count, _times([*readers(augment=True), *pillow], bench.rounds))


def _decoding(files: Path, name: str, cut: data_pictures.Cut) -> Reader:
    return Reader(name, lambda: _once(lambda: data_pictures.by_pillow(files, cut)))


def _once(run: Callable[[], Any]) -> Iterator[Any]:
    yield run()


def build(bench: Bench) -> list[Measured]:
    """`data build` of PNGs with their captions beside them."""
    rows = []
    for count, size in ((bench.sizes.small_pngs, 64), (bench.sizes.large_pngs, 256)):
        source, out = bench.folder / f"png{size}", bench.folder / "out"
        data_sets.write_pngs(source, count, size)
        cases = {
            "ours": partial(data_pictures.our_build, source, out, bench.sizes.samples_per_shard),
            "floor: read, decode, write": partial(data_pictures.floor_of_build, source, out),
            "Pillow alone": partial(data_pictures.by_pillow, source, None),
        }
        timed = {name: partial(common.seconds, run) for name, run in cases.items()}
        times = common.interleaved(timed, bench.rounds, processes.apart)
        rows += speeds(f"build, {size}x{size}", count, times)
    return rows


def order(bench: Bench) -> list[Measured]:
    """The places of samples of a large set, whose shards are not there."""
    small, large = bench.folder / "to-resume", bench.folder / "to-hold"
    data_sets.write_large_index(small, bench.sizes.shards_to_resume, 1_000)
    data_sets.write_large_index(large, bench.sizes.shards_to_hold, 1_000)
    whole, inside, alone, peak, together = [], [], [], [], []
    for _ in range(bench.rounds):
        start = time.perf_counter()
        inside.append(_told("first", small, bench)["seconds"])
        whole.append(time.perf_counter() - start)
    for _ in range(min(bench.rounds, MEMORY_ROUNDS)):
        found = _told("alone", large, bench)
        alone.append(found["bytes"] / 2**20)
        peak.append(found["peak"] / 2**20)
        together.append(_told("workers", large, bench)["bytes"] / 2**20)
    resumed, held = (
        f"{n // 1_000:,}k shards"
        for n in (bench.sizes.shards_to_resume, bench.sizes.shards_to_hold)
    )
    return [
        Measured(resumed, "first batch, from the imports on", "s", inside),
        Measured(resumed, "first batch, imports too", "s", whole),
        Measured(held, "order and its batches: memory", "MiB", alone),
        Measured(held, "order and its batches: peak", "MiB", peak),
        Measured(held, f"{data_order.WORKERS} loader processes", "MiB", together),
    ]


def _told(what: str, folder: Path, bench: Bench) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data_order", what, str(folder)]
    run = subprocess.run(
        [*command, f"--batches={bench.sizes.batches}"], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"data: data_order {what}: {run.stderr}")
    return dict(json.loads(run.stdout))


PARTS: Mapping[str, Callable[[Bench], list[Measured]]] = {
    "tokens": tokens, "s3": s3, "images": images, "order": order, "build": build,
}  # fmt: skip


if __name__ == "__main__":
    main()
