"""Who reads and builds pictures in the data benchmark: ours, rivals, and what Pillow alone takes.

Every reader decodes the same JPEGs and cuts them by the same `Augmentation`; Pillow alone also by
its plain steps. For the check, all cut the centre.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from benchmarks.data_tokens import Pair, Reader, order_of
from benchmarks.processes import together
from dalle_dist.data.augment import Augmentation, centre
from dalle_dist.data.build.build import build
from dalle_dist.data.build.options import Options
from dalle_dist.data.image_dataset import ImageBatch, ImageDataset, collate_images
from dalle_dist.data.loader import batches

SIZE, BATCH, WORKERS = 256, 32, 2
ROUNDING = 2  # of 255 levels
Cut = Callable[[Image.Image, str], Image.Image]
PAPER = Augmentation(SIZE, crop_min=9 / 8, crop_max=12 / 8, flip=True)


def _cut(image: Image.Image, seed: str, augment: bool) -> Image.Image:
    return PAPER(image, seed) if augment else centre(image, SIZE)


def _pixels(image: Image.Image) -> Tensor:
    """[C, H, W], uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def ours(folder: str, augment: bool = True) -> Reader:
    def open_() -> Iterator[ImageBatch]:
        dataset = ImageDataset(folder, order_of(folder), SIZE, PAPER if augment else None, 0)

        def epoch() -> Iterator[ImageBatch]:  # the workers start when the clock does
            stream = batches(
                dataset, batch_size=BATCH, micro_batch=BATCH, rank=0, world=1, start=0,
                workers=WORKERS, collate=collate_images,
            )  # fmt: skip
            yield from itertools.islice(stream, len(dataset) // BATCH)

        return epoch()

    return Reader("ours", open_, lambda batch: (batch.image_BCHW, batch.captions))


def by_webdataset(urls: list[str], augment: bool = True) -> Reader:
    def sample(found: tuple[Image.Image, str, str]) -> tuple[Tensor, str]:
        image, caption, key = found
        return _pixels(_cut(image, key, augment)), caption

    def open_() -> Iterable[Pair]:
        tars = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        samples = tars.shuffle(1_000).decode("pil").to_tuple("jpg", "txt", "__key__").map(sample)
        batched = samples.batched(BATCH, collation_fn=_collate)
        return webdataset.WebLoader(batched, batch_size=None, num_workers=WORKERS)

    return Reader(f"webdataset {common.version_of('webdataset')}", open_)


class _Files(Dataset):
    def __init__(self, folder: Path, augment: bool) -> None:
        self._paths, self._augment = _pictures(folder), augment

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        path = self._paths[i]
        image = Image.open(path).convert("RGB")
        return _pixels(_cut(image, str(i), self._augment)), path.with_suffix(".txt").read_text()


def by_files(folder: Path, augment: bool = True) -> Reader:
    def open_() -> Iterable[Pair]:
        files = _Files(folder, augment)
        return DataLoader(files, BATCH, shuffle=True, num_workers=WORKERS, collate_fn=_collate)

    return Reader(f"DataLoader {torch.__version__}, files", open_)


def _collate(samples: Sequence[tuple[Tensor, str]]) -> Pair:
    images, captions = zip(*samples, strict=True)
    return torch.stack(images), list(captions)


def paper_by_pillow(image: Image.Image, seed: str) -> Image.Image:
    """`PAPER` in its plain steps: the whole square is resized, then cut."""
    generator, side = random.Random(seed), min(image.size)
    place = generator.random(), generator.random()
    if image.size != (side, side):
        image = _square(image, side, *place)
    low, high = round(PAPER.crop_min * SIZE), round(PAPER.crop_max * SIZE)
    side = generator.randint(low, high if side <= low else min(side, high))
    if side != image.width:
        smaller = side < image.width
        filter_ = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
        image = image.resize((side, side), filter_)
    image = _square(image, SIZE, generator.random(), generator.random())
    flipped = generator.random() < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image


def _square(image: Image.Image, side: int, x: float, y: float) -> Image.Image:
    left, top = int(x * (image.width - side + 1)), int(y * (image.height - side + 1))
    return image.crop((left, top, left + side, top + side))


def require_same_cut(folder: Path, count: int) -> None:
    """Raises SystemExit unless `PAPER` makes of images what its plain steps make, to rounding."""
    for path in _pictures(folder)[:count]:
        image = Image.open(path).convert("RGB")
        cuts = (np.asarray(cut(image, path.stem), np.int16) for cut in (PAPER, paper_by_pillow))
        if (far := np.abs(np.subtract(*cuts)).max()) > ROUNDING:
            raise SystemExit(f"data: {path.name}: our cut is {far} of 255 levels from Pillow's")


def by_pillow(folder: Path, cut: Cut | None) -> None:
    """Decodes all files of a folder, and cuts them if asked to, in WORKERS processes."""

    def work(paths: Sequence[Path]) -> None:
        for path in paths:
            with Image.open(io.BytesIO(path.read_bytes())) as opened:
                image = opened.convert("RGB")
            if cut is not None:
                cut(image, path.stem)

    _shared(_pictures(folder), work)


def floor_of_build(source: Path, out: Path) -> None:
    """Reads, decodes and writes what a build must, and no more: one file of each process."""

    def work(paths: Sequence[Path]) -> None:
        with (out / paths[0].stem).open("wb") as file:
            for path in paths:
                data = path.read_bytes()
                with Image.open(io.BytesIO(data)) as opened:
                    opened.load()
                file.write(data)
                file.write(path.with_suffix(".txt").read_bytes())

    out.mkdir()
    _shared(_pictures(source), work)
    shutil.rmtree(out)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".txt")


def _shared(paths: Sequence[Path], work: Callable[[Sequence[Path]], Any]) -> None:
    together([lambda i=i: work(paths[i::WORKERS]) for i in range(WORKERS)])


def our_build(source: Path, out: Path, samples_per_shard: int) -> None:
    options = Options(samples_per_shard=samples_per_shard, processes=WORKERS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        build(str(source), str(out), options)
    shutil.rmtree(out)
