"""Who reads token samples in the data benchmark: ours and rivals, each in batches of one epoch.

mosaicml-streaming would change the versions of our packages; it may lie in a folder of its own:

    pip install --target DIR --no-deps mosaicml-streaming==0.13.0 xxhash zstd python-snappy \
        Brotli cramjam catalogue
"""

from __future__ import annotations

import hashlib
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet  # noqa: F401 - before the clock starts, as all that others import
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import common, data_sets
from dalle_dist import storage
from dalle_dist.data.loader import batches
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardIndex
from dalle_dist.data.source import SampleSource
from dalle_dist.data.token_dataset import (
    NpyReader,
    TokenDataset,
    TokenNoise,
    TokenSample,
    collate_tokens,
)
from dalle_dist.text_tokenizer.bpe import Tokenizer

BATCH, STREAMS, SHUFFLE_SHARDS, BUFFER, TEXT = 64, 64, 2, 1_000, 256
STREAMING = "0.13.0"
COLUMNS = {"codes": f"ndarray:uint16:{data_sets.CODES}", "caption": "str"}
Pair = tuple[Tensor, list[str]]  # codes_BN int64, captions


@dataclass(frozen=True)
class Reader:
    """A way to read a set.

    open   prepares, and returns the batches of an epoch; what they cost is what is timed
    pair   of a batch, what all readers must agree on
    """

    name: str
    open: Callable[[], Iterable[Any]]
    pair: Callable[[Any], Pair] = lambda batch: batch


def digest(reader: Reader) -> tuple[int, str]:
    """(samples, hash of them in whatever order) of an epoch."""
    found = []
    for batch in reader.open():
        for tensor, text in zip(*reader.pair(batch), strict=True):
            whole = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16)
            whole.update(text.encode())
            found.append(whole.digest())
    return len(found), hashlib.sha256(b"".join(sorted(found))).hexdigest()


def order_of(folder: str) -> SampleOrder:
    sizes = ShardIndex.load(folder).shards.samples
    return SampleOrder(0, sizes, STREAMS, SHUFFLE_SHARDS)


class _Pairs(Dataset):
    """Codes and captions as they are."""

    def __init__(self, folder: str) -> None:
        self.source = SampleSource(folder, "tokens", order_of(folder))
        self._npy = NpyReader()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> tuple[Tensor, str]:
        files = self.source.read(self.source.reading(position))
        codes_N = self._npy.read(files["npy"]).astype(np.int64)
        return torch.from_numpy(codes_N), files["txt"].decode()


def _collate(samples: Sequence[tuple[Tensor, str]]) -> Pair:
    codes, captions = zip(*samples, strict=True)
    return torch.stack(codes), list(captions)


def ours(folder: str, name: str = "ours", epochs_before: int = 0) -> Reader:
    """Later epochs find the shards opened, and their hashes compared."""

    def open_() -> Iterator[Pair]:
        dataset = _Pairs(folder)
        for _ in range(epochs_before):
            for _ in _epoch(dataset, _collate):
                pass
        return _epoch(dataset, _collate)

    return Reader(name, open_)


def ours_tokenized(folder: str, tokenizer: Tokenizer, dropout: float) -> Reader:
    def open_() -> Iterator[TokenSample]:
        dataset = TokenDataset(
            folder,
            order_of(folder),
            tokenizer,
            TEXT,
            data_sets.META["image_tokenizer"],
            data_sets.META["grid"],
            noise=TokenNoise(bpe_dropout=dropout),
        )
        return _epoch(dataset, collate_tokens)

    def pair(batch: TokenSample) -> Pair:
        return batch.codes, [tokenizer.decode(row) for row in batch.text.tolist()]

    return Reader(f"ours, BPE{f' dropout {dropout}' if dropout else ''}", open_, pair)


def _epoch(dataset: Any, collate: Callable[[Sequence[Any]], Any]) -> Iterator[Any]:
    stream = batches(
        dataset, batch_size=BATCH, micro_batch=BATCH, rank=0, world=1, start=0, workers=0,
        collate=collate,
    )  # fmt: skip
    return itertools.islice(stream, len(dataset) // BATCH)


def by_webdataset(urls: list[str], name: str = "", cache: Path | None = None) -> Reader:
    """With a buffer of BUFFER samples to shuffle, as its documentation has it."""

    def open_() -> Iterable[Pair]:
        kept = {} if cache is None else {"cache_dir": str(cache)}
        tars = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, **kept)
        return (
            tars.shuffle(BUFFER)
            .to_tuple("npy", "txt")
            .map_tuple(_tensor, bytes.decode)
            .batched(BATCH, collation_fn=_collate)
        )

    version = common.version_of("webdataset")
    return Reader(f"webdataset {version}{name}", open_)


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data)).astype(np.int64))


class _Files(Dataset):
    def __init__(self, folder: Path) -> None:
        self._paths = [str(path) for path in sorted(folder.glob("*.npy"))]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        path = self._paths[i]
        with open(path[:-3] + "txt", encoding="utf-8") as file:  # noqa: PTH123 - the quickest way
            return torch.from_numpy(np.load(path).astype(np.int64)), file.read()


def by_files(folder: Path) -> Reader:
    def open_() -> Iterable[Pair]:
        return DataLoader(_Files(folder), BATCH, shuffle=True, collate_fn=_collate)

    return Reader(f"DataLoader {torch.__version__}, files", open_)


def import_streaming(folder: Path | None) -> Any:
    """mosaicml-streaming, or None where it is not installed."""
    if folder is not None:
        sys.path.append(str(folder))
    try:
        import torchvision  # noqa: F401
    except ImportError:
        # It is imported for data sets that are not read here.
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            sys.modules[name] = _Absent(name)
    try:
        import streaming
    except ImportError as error:
        print(f"data: mosaicml-streaming is left out: {error}")
        return None
    if streaming.__version__ != STREAMING:
        raise SystemExit(f"data: mosaicml-streaming {streaming.__version__}, not {STREAMING}")
    return streaming


class _Absent(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def write_mds(streaming: Any, out: str, count: int) -> None:
    with streaming.MDSWriter(out=out, columns=COLUMNS) as writer:
        for codes_N, caption in data_sets.token_samples(count):
            writer.write({"codes": codes_N, "caption": caption})


def by_streaming(
    streaming: Any, folder: Callable[[], str], remote: str | None = None, name: str = ""
) -> Reader:
    """From its own format; `folder` makes or names the local one."""

    def collate(samples: Sequence[dict[str, Any]]) -> Pair:
        codes = [torch.from_numpy(sample["codes"].astype(np.int64)) for sample in samples]
        return torch.stack(codes), [sample["caption"] for sample in samples]

    def open_() -> Iterable[Pair]:
        dataset = streaming.StreamingDataset(
            local=folder(), remote=remote, batch_size=BATCH, shuffle=True
        )
        return DataLoader(dataset, BATCH, collate_fn=collate)

    return Reader(f"mosaicml-streaming {STREAMING}{name}", open_)


def upload(folder: Path, url: str) -> None:
    storage.publish_folder(folder, url)
