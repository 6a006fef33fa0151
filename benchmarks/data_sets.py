"""What the data benchmark reads, made from a seed: token samples, pictures, indexes, in each form.

Shape suffixes: N image tokens of a sample.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dalle_dist.data.shards import ShardInfo, ShardWriter, write_index

CODES, CODEBOOK = 1_024, 8_192
WORDS, WORDS_OF_CAPTION = 5_000, 10
SYLLABLES = ("ba", "co", "di", "fu", "ge", "lin", "mo", "nar", "pe", "qui", "ros", "sta", "ter")
META = {"image_tokenizer": "benchmark", "grid": 32, "codebook_size": CODEBOOK}
Sample = tuple[np.ndarray, str]  # codes_N uint16, caption


def captions(count: int, seed: int = 0) -> list[str]:
    """Of ten words, frequent and rare ones as in a language."""
    generator = np.random.default_rng(seed)
    syllables = generator.choice(SYLLABLES, (WORDS, 4))
    lengths = generator.integers(1, 5, WORDS)
    words = ["".join(row[:n]) for row, n in zip(syllables, lengths, strict=True)]
    frequency = 1 / np.arange(1, WORDS + 1)
    chosen = generator.choice(words, (count, WORDS_OF_CAPTION), p=frequency / frequency.sum())
    return [" ".join(row) for row in chosen]


def token_samples(count: int) -> Iterator[Sample]:
    generator = np.random.default_rng(1)
    for caption in captions(count):
        yield generator.integers(CODEBOOK, size=CODES, dtype=np.uint16), caption


def npy(codes_N: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, codes_N)
    return buffer.getvalue()


def write_token_shards(folder: Path, count: int, samples_per_shard: int) -> None:
    with ShardWriter(str(folder), "tokens", META, samples_per_shard) as shards:
        for i, (codes_N, caption) in enumerate(token_samples(count)):
            shards.write(f"{i:09d}", {"npy": npy(codes_N), "txt": caption.encode()})


def write_token_files(folder: Path, count: int) -> None:
    """Two files a sample."""
    folder.mkdir()
    for i, (codes_N, caption) in enumerate(token_samples(count)):
        (folder / f"{i:09d}.npy").write_bytes(npy(codes_N))
        (folder / f"{i:09d}.txt").write_text(caption)


def picture(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth, with some detail: colours of three coarse grids, the finest the faintest."""
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for cell, contrast in ((64, 90), (16, 40), (4, 16)):
        shape = (max(height // cell, 2), max(width // cell, 2), 3)
        coarse = Image.fromarray(generator.integers(256, size=shape, dtype=np.uint8))
        fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels += (fine / 127.5 - 1) * contrast
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_jpegs(folder: Path, count: int) -> None:
    """About 320 x 256, each with its caption beside it."""
    generator = np.random.default_rng(2)
    sizes = generator.integers((300, 240), (341, 273), (count, 2))
    folder.mkdir()
    for i, (caption, (width, height)) in enumerate(zip(captions(count), sizes, strict=True)):
        picture(generator, int(width), int(height)).save(folder / f"{i:06d}.jpg", quality=90)
        (folder / f"{i:06d}.txt").write_text(caption)


def write_pngs(folder: Path, count: int, size: int) -> None:
    """size x size, each with its caption beside it."""
    generator = np.random.default_rng(3)
    folder.mkdir()
    for i, caption in enumerate(captions(count)):
        picture(generator, size, size).save(folder / f"{i:06d}.png")
        (folder / f"{i:06d}.txt").write_text(caption)


def write_image_shards(folder: Path, jpegs: Path, samples_per_shard: int) -> None:
    with ShardWriter(str(folder), "images", {}, samples_per_shard) as shards:
        for path in sorted(jpegs.glob("*.jpg")):
            files = {"jpg": path.read_bytes(), "txt": path.with_suffix(".txt").read_bytes()}
            shards.write(path.stem, files)


def write_large_index(folder: Path, shards: int, samples_per_shard: int) -> None:
    """An index without its shards."""
    digests = np.random.default_rng(4).bytes(64 * shards)
    rows = []
    for i in range(shards):
        digest = digests[64 * i : 64 * (i + 1)].hex()
        rows.append(
            ShardInfo(
                f"{i:05d}.tar", 5_130_240, digest[:64], samples_per_shard, 30_000, digest[64:]
            )
        )
    write_index(str(folder), "tokens", META, rows)
