"""`dalle-dist data inspect`: what is in a folder of shards, read from index and side files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dalle_dist.data.contact_sheet import write_contact_sheet
from dalle_dist.data.shards import ShardSet, parts_of
from dalle_dist.data.shards.index import RANDOM_LINE
from dalle_dist.data.source import caption_lines
from dalle_dist.data.token_dataset import NpyReader
from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.bpe import Tokenizer
from dalle_dist.text_tokenizer.protocol import TextTokenizer

SHARDS = 200  # whose side files are looked at, where there are more
TOKEN_SHARDS = 8  # whose codes are counted: these alone are read from tars
THREADS = 8  # that fetch side files
SIZES = 5  # image sizes named, the most frequent first


@dataclass(frozen=True)
class TextBlock:
    """Of stage 2: a caption of more than `tokens` tokens is cut."""

    tokenizer: TextTokenizer
    tokens: int

    @classmethod
    def of(cls, tokenizer: str | None, tokens: int | None) -> TextBlock | None:
        """None where neither is given. Raises DataError: one without the other, or no tokenizer."""
        if tokenizer is None and tokens is None:
            return None
        if tokenizer is None or tokens is None or tokens < 1:
            raise DataError(
                "--text-tokens N and --tokenizer FILE go together, with N at least 1: how many "
                "captions are cut depends on both"
            )
        return cls(Tokenizer.load(tokenizer), tokens)


def inspect(folder: str, contact_sheet: str | None, block: TextBlock | None = None) -> None:
    """Print what `folder`, or its train/ and held-out/ parts, hold.

    Only the contact sheet, and the codes of token shards, are read from tars: from a few of them.

    Raises:
        DataError: no shards here, a side file is damaged, or a sheet of tokens is asked for.
    """
    sets = [ShardSet(place) for place in parts_of(folder)]
    if contact_sheet is not None and sets[0].index.kind != "images":
        raise DataError(
            f"{folder}: holds tokens, which are no pictures; 'dalle-dist encode' shows what they "
            "decode to in train-preview.png and held-out-preview.png beside them"
        )
    for shards in sets:
        _print(shards, block)
    if contact_sheet is not None:
        write_contact_sheet(sets[0], contact_sheet)


@dataclass
class _Look:
    """What the side files of some shards say."""

    captions: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    no_size: int = 0


def _look(shards: ShardSet, chosen: Sequence[int]) -> _Look:
    look, several = _Look(), shards.index.meta.get("captions") == RANDOM_LINE

    def read(shard: int) -> tuple[list[str], list[tuple[int | None, int | None]]]:
        columns = (shards.column(shard, name) for name in ("width", "height"))
        return shards.captions(shard), list(zip(*columns, strict=True))

    with ThreadPoolExecutor(THREADS) as pool:
        for captions, sizes in pool.map(read, chosen):
            for caption in captions:
                look.captions += (caption_lines(caption) or [""]) if several else [caption]
            found = [(w, h) for w, h in sizes if w is not None and h is not None]
            look.sizes += found
            look.no_size += len(sizes) - len(found)
    return look


def _print(shards: ShardSet, block: TextBlock | None) -> None:
    index, chosen = shards.index, shards.evenly(SHARDS)
    print(
        f"{shards.folder}: {len(shards)} {index.kind} in {len(shards.sizes)} shards, "
        f"{index.shards.bytes} bytes"
    )
    if len(chosen) < np.count_nonzero(shards.sizes):
        count = int(shards.sizes[chosen].sum())
        print(f"  looked at           {count} of them, in {len(chosen)} shards, evenly spread")
    look = _look(shards, chosen)
    rows = [*_of_captions(look.captions, block)]
    rows += _of_sizes(look) if index.kind == "images" else _of_codes(shards)
    for name, text in rows:
        print(f"  {name:18}  {text}")


def _of_captions(captions: list[str], block: TextBlock | None) -> Iterator[tuple[str, str]]:
    yield "captions", str(len(captions))
    yield "caption characters", _range(len(caption) for caption in captions)
    yield "caption words", _range(len(caption.split()) for caption in captions)
    told = [caption.strip() for caption in captions if caption.strip()]
    yield "empty captions", _share(len(captions) - len(told), len(captions))
    yield "repeated captions", _share(len(told) - len(set(told)), len(captions))
    if block is not None:
        lengths = [len(block.tokenizer.encode(caption)) for caption in captions]
        cut = sum(length > block.tokens for length in lengths)
        yield "caption tokens", _range(lengths)
        yield f"cut to {block.tokens} tokens", _share(cut, len(captions))


def _of_sizes(look: _Look) -> Iterator[tuple[str, str]]:
    if look.sizes:
        yield "shorter side", f"{_range(min(size) for size in look.sizes)} pixels"
    counts = Counter(f"{width}x{height}" for width, height in look.sizes)
    yield from ((name, f"{count} images") for name, count in counts.most_common(SIZES))
    if len(counts) > SIZES:
        yield "other sizes", str(len(counts) - SIZES)
    if look.no_size:
        yield "of unknown size", f"{look.no_size} images"


def _of_codes(shards: ShardSet) -> Iterator[tuple[str, str]]:
    meta, npy = shards.index.meta, NpyReader()
    yield "image tokenizer", str(meta.get("image_tokenizer", "unknown"))
    used, chosen = set[int](), shards.evenly(TOKEN_SHARDS)
    shapes = Counter[tuple[int, int]]()  # crops, codes of each
    for shard in chosen:
        for number in range(int(shards.sizes[shard])):
            codes = np.atleast_2d(npy.read(shards.read_at(shard, number).get("npy", b"")))
            shapes[(len(codes), codes.shape[-1])] += 1
            used.update(np.unique(codes).tolist())
    for (crops, codes_of_each), count in shapes.most_common(SIZES):
        flipped = ", some mirrored" * bool(meta.get("flip"))
        yield (
            "crops of an image",
            f"{crops}{flipped}, of {codes_of_each} codes each: {count} images",
        )
    of = meta.get("codebook_size", "unknown")
    yield "codes in use", f"{len(used)} of {of}, in {len(chosen)} shards"


def _range(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return f"min {ordered[0]}, median {ordered[len(ordered) // 2]}, max {ordered[-1]}"


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.1%})"
