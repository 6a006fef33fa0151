import io
import json
import warnings

import numpy as np
import pytest
import torch

from dalle_dist.data.augment import Augmentation
from dalle_dist.data.loader import (
    ImageDataset,
    TokenDataset,
    batches,
    collate_images,
    collate_tokens,
)
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardWriter
from dalle_dist.errors import ConfigError, DataError
from dalle_dist.text_tokenizer.bpe import PAD, train_tokenizer

N, GRID = 23, 2


def _write_images(folder, image, corrupt=()):
    with ShardWriter(str(folder), "images", {}, samples_per_shard=5) as writer:
        for i in range(N):
            data = b"not an image" if i in corrupt else image((i, 0, 0))
            writer.write(f"{i:03d}", {"png": data, "txt": f"number {i}".encode()})
    return str(folder)


def _write_tokens(folder, captions):
    with ShardWriter(str(folder), "tokens", {"image_tokenizer": "aa", "grid": GRID}) as writer:
        for i, caption in enumerate(captions):
            buffer = io.BytesIO()
            np.save(buffer, np.arange(i, i + GRID**2, dtype=np.uint16))
            about = json.dumps({"source": str(i)}).encode()
            writer.write(
                f"{i:03d}", {"npy": buffer.getvalue(), "txt": caption.encode(), "json": about}
            )
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red heart", "a blue heart", "one two three"], 300)


def _order(seed=0):
    return SampleOrder(seed, [5, 5, 5, 5, 3], 2)


def _positions(dataset, rank, world, micro, workers=0, start=0, updates=5):
    stream = batches(
        dataset,
        batch_size=8,
        micro_batch=micro,
        rank=rank,
        world=world,
        start=start,
        workers=workers,
        collate=collate_images,
    )
    per_update = 8 // (world * micro)
    return [
        [int(p) for _ in range(per_update) for p in next(stream).positions] for _ in range(updates)
    ]


def test_the_union_over_ranks_is_the_same_for_every_number_of_ranks(tmp_path, image):
    dataset = ImageDataset(_write_images(tmp_path / "s", image), _order(), 8, None, 0)
    for world, micro in ((1, 8), (1, 2), (2, 4), (2, 2), (4, 1), (8, 1)):
        ranks = [_positions(dataset, rank, world, micro) for rank in range(world)]
        for update in range(5):
            union = sorted(p for rank in ranks for p in rank[update])
            assert union == list(range(8 * update, 8 * update + 8)), (world, micro)


def test_micro_batches_of_different_world_sizes_hold_the_same_samples(tmp_path, image):
    """Stretch a of one rank with micro-batch 4 is that of two ranks with micro-batch 2."""
    dataset = ImageDataset(_write_images(tmp_path / "s", image), _order(), 8, None, 0)
    one = _positions(dataset, 0, 1, 4)
    two = [_positions(dataset, rank, 2, 2) for rank in (0, 1)]
    for update in range(5):
        joined = [two[0][update][:2], two[1][update][:2], two[0][update][2:], two[1][update][2:]]
        assert one[update] == [p for part in joined for p in part]


def test_workers_and_restarts_change_nothing(tmp_path, image):
    augment = Augmentation(8, 1.1, 1.5, True)
    folder = _write_images(tmp_path / "s", image)

    def stream(workers, start):
        return batches(
            ImageDataset(folder, _order(), 8, augment, 0),
            batch_size=8,
            micro_batch=4,
            rank=1,
            world=2,
            start=start,
            workers=workers,
            collate=collate_images,
        )

    alone, crowd, later = stream(0, 0), stream(2, 0), stream(0, 3)
    for update in range(6):
        a, b = next(alone), next(crowd)
        others = [b, next(later)] if update >= 3 else [b]
        for other in others:
            assert (a.keys, a.captions) == (other.keys, other.captions)
            assert torch.equal(a.positions, other.positions)
            assert torch.equal(a.image_BCHW, other.image_BCHW)


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, image):
    dataset = ImageDataset(_write_images(tmp_path / "s", image), _order(), 8, None, 0)
    with pytest.raises(ConfigError, match="8 is not a multiple of 3 ranks x micro-batch 1"):
        _positions(dataset, 0, 3, 1)


def test_pictures_come_in_the_orders_sequence_with_their_captions(tmp_path, image):
    dataset = ImageDataset(_write_images(tmp_path / "s", image), _order(), 8, None, 0)
    plain = ImageDataset(str(tmp_path / "s"), None, 8, None, 0)
    for position in (0, 5, N, 2 * N + 1):
        index = _order().at(position)[1]
        sample = dataset[position]
        assert (sample.key, sample.caption) == (f"{index:03d}", f"number {index}")
        assert sample.position == position
        assert sample.image_CHW.shape == (3, 8, 8) and sample.image_CHW.dtype == torch.uint8
        assert sample.image_CHW[0].unique().tolist() == [index]
        assert plain[index].key == f"{index:03d}"


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_pictures_are_counted_named_once_and_replaced(tmp_path, image, workers):
    dataset = ImageDataset(_write_images(tmp_path / "s", image, (3, 4)), None, 8, None, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if workers:
            _positions(dataset, 0, 1, 4, workers, updates=1)
            assert dataset.corrupt == 2, "what loader processes found is known to their parent"
        keys = [dataset[i].key for i in (3, 4, 5, 3)]
    assert keys == ["005", "005", "005", "005"]
    assert dataset.corrupt == 2
    if not workers:
        assert [str(w.message).split(": ")[1] for w in caught] == [
            "003 cannot be decoded, skipped",
            "004 cannot be decoded, skipped",
        ]


def test_nothing_but_corrupt_pictures_is_fatal(tmp_path, image):
    dataset = ImageDataset(_write_images(tmp_path / "s", image, range(N)), None, 8, None, 0)
    with (
        pytest.warns(UserWarning, match="cannot be decoded"),
        pytest.raises(DataError, match="none of 23 images can be decoded"),
    ):
        dataset[0]


def test_token_samples(tmp_path, tokenizer):
    captions = ["a red heart", "one two three", ""]
    dataset = TokenDataset(
        _write_tokens(tmp_path / "t", captions), None, tokenizer, 12, 0.0, 0, "aa", GRID
    )
    text_BT, codes_BN = collate_tokens([dataset[i] for i in range(3)])
    assert text_BT.dtype == codes_BN.dtype == torch.int64
    assert codes_BN.tolist() == [[i, i + 1, i + 2, i + 3] for i in range(3)]
    for row, caption in zip(text_BT.tolist(), captions, strict=True):
        ids = tokenizer.encode(caption)
        assert row == ids + [PAD] * (12 - len(ids))
    assert dataset.key(1) == "001"


def test_captions_long_or_empty_have_the_length_of_the_text_block(tmp_path, tokenizer):
    captions = ["a red heart " * 5, "a", " "]
    dataset = TokenDataset(
        _write_tokens(tmp_path / "t", captions), None, tokenizer, 4, 0.0, 0, "aa", GRID
    )
    long, short, empty = (dataset[i][0].tolist() for i in range(3))
    assert long == tokenizer.encode(captions[0])[:4] and len(tokenizer.encode(captions[0])) > 4
    assert len(short) == len(empty) == 4 and short[-1] == empty[-1] == PAD


def test_dropout_differs_between_epochs_and_is_reproducible(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["one two three a red heart"])

    def epochs():
        order = SampleOrder(0, [1], 1)
        dataset = TokenDataset(folder, order, tokenizer, 30, 0.3, 0, "aa", GRID)
        return [dataset[p][0].tolist() for p in range(8)]

    assert epochs() == epochs()
    assert len({tuple(ids) for ids in epochs()}) > 3


def _texts(folder, tokenizer, samples, caption_dropout, bpe_dropout=0.3, seed=0):
    """Two epochs of rows, by position."""
    order = SampleOrder(0, [samples], 1)
    dataset = TokenDataset(
        folder, order, tokenizer, 30, bpe_dropout, seed, "aa", GRID, caption_dropout
    )
    return {p: dataset[p][0].tolist() for p in reversed(range(2 * samples))}


def test_a_dropped_caption_is_all_pads_and_the_others_are_as_without_dropout(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["one two three a red heart"] * 200)
    kept, some = (_texts(folder, tokenizer, 200, share) for share in (0.0, 0.3))
    dropped = {p for p, row in some.items() if row == [PAD] * 30}
    assert 90 <= len(dropped) <= 150
    assert not any(row == [PAD] * 30 for row in kept.values())
    assert {p: row for p, row in some.items() if p not in dropped} == {
        p: row for p, row in kept.items() if p not in dropped
    }
    # Other samples in the second epoch.
    order = SampleOrder(0, [200], 1)
    first, second = (
        {order.at(p)[1] for p in dropped if order.at(p)[0] == epoch} for epoch in (0, 1)
    )
    assert first != second


def test_which_captions_are_dropped_depends_on_the_seed_not_on_bpe_dropout(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["a red heart"] * 100)

    def dropped(bpe_dropout, seed):
        texts = _texts(folder, tokenizer, 100, 0.3, bpe_dropout, seed)
        return {p for p, row in texts.items() if row[0] == PAD}

    assert dropped(0.0, 0) == dropped(0.3, 0) != dropped(0.3, 1)


@pytest.mark.parametrize(
    ("fingerprint", "grid", "message"),
    [
        ("bb", GRID, "tokens of image tokenizer aa, but the run's is bb"),
        ("aa", 4, "tokens of grid 2, but"),
    ],
)
def test_tokens_of_another_dvae_are_refused(tmp_path, tokenizer, fingerprint, grid, message):
    folder = _write_tokens(tmp_path / "t", ["a"])
    with pytest.raises(DataError, match=message):
        TokenDataset(folder, None, tokenizer, 8, 0.0, 0, fingerprint, grid)
