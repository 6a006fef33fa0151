import gc
import io
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from dalle_dist.data import image_dataset
from dalle_dist.data.augment import Augmentation
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.image_dataset import ImageDataset, collate_images
from dalle_dist.data.loader import batches
from dalle_dist.data.notes import Notes
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardWriter
from dalle_dist.errors import ConfigError, DataError

N = 23


def _write_images(folder, image, corrupt=()):
    with ShardWriter(str(folder), "images", {}, samples_per_shard=5) as writer:
        for i in range(N):
            data = b"not an image" if i in corrupt else image((i, 0, 0))
            writer.write(f"{i:03d}", {"png": data, "txt": f"number {i}".encode()})
    return str(folder)


def test_pixels_are_those_of_the_image(tmp_path):
    pixels_HWC = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="PNG")
    with ShardWriter(str(tmp_path / "s"), "images", {}) as writer:
        writer.write("a", {"png": buffer.getvalue()})
    found = ImageDataset(str(tmp_path / "s"), None, 8, None, 0).read(0).image_CHW
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels_HWC)


@pytest.mark.parametrize(("missing", "decoded"), [(0, N), (1, 2 * N)])
def test_decoded_images_are_kept_only_of_a_set_that_fits(
    tmp_path, image, monkeypatch, missing, decoded
):
    calls = []

    def counted(files):
        calls.append(files["txt"])
        return decode_sample(files)

    monkeypatch.setattr(image_dataset, "CACHE_BYTES", N * 4 * 8 * 8 - missing)
    monkeypatch.setattr(image_dataset, "decode_sample", counted)
    dataset = ImageDataset(_write_images(tmp_path / "s", image), None, 8, None, 0)
    for i in (*range(N), *range(N)):
        dataset.read(i)
    assert len(calls) == decoded


def _order(seed=0):
    return SampleOrder(seed, [5, 5, 5, 5, 3], 8, 2)


def _positions(dataset, rank, world, micro, workers=0, start=0, updates=5, notes=None):
    stream = batches(
        dataset,
        batch_size=8,
        micro_batch=micro,
        rank=rank,
        world=world,
        start=start,
        workers=workers,
        collate=collate_images,
        notes=notes,
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
        first = sorted(two[0][update][:2] + two[1][update][:2])
        second = sorted(two[0][update][2:] + two[1][update][2:])
        assert (first, second) == (one[update][:4], one[update][4:])


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

    alone, crowd, later = stream(0, 0), stream(2, 0), stream(0, 3 * 8)
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
        _, shard, number = _order().at(position)
        index = 5 * shard + number
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
        found = Notes()
        _positions(dataset, 0, 1, 4, workers, updates=1, notes=found)
        assert found.corrupt == {"003", "004"}, "what loader processes found, their parent knows"
        keys = [dataset[i].key for i in (3, 4, 5, 3)]
    assert keys == ["000", "000", "005", "000"]
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


class Inherited:
    """In a cycle, so that only the garbage collector ends it; leaves word where it ends."""

    def __init__(self, folder):
        self.folder, self.itself = folder, self

    def __del__(self):
        (self.folder / str(os.getpid())).touch()


class Collecting(Dataset):
    """Drops what it was given before the fork, then collects, as a worker may at any time."""

    def __init__(self, held):
        self.held = held

    def __getitem__(self, position):
        self.held.clear()
        gc.collect()
        return torch.tensor(os.getpid())


def test_a_worker_does_not_collect_what_it_inherited(tmp_path):
    """A process group's destructor never ends in a forked process."""
    gc.disable()
    try:
        Inherited(tmp_path)  # garbage before the fork, not yet collected
        drawn = batches(
            Collecting([Inherited(tmp_path)]), batch_size=2, micro_batch=2, rank=0, world=1,
            start=0, workers=1, collate=lambda pids: torch.stack([*pids]),
        )  # fmt: skip
        workers = {int(pid) for _ in range(3) for pid in next(drawn)}
    finally:
        gc.enable()
    assert os.getpid() not in workers
    ended_in = {int(file.name) for file in tmp_path.iterdir()}
    assert ended_in == {os.getpid()}


class Places(Dataset):
    """Samples of an order themselves."""

    def __init__(self, sizes, streams, window):
        self.order = SampleOrder(7, sizes, streams, window)

    def __getitem__(self, position):
        return self.order.at(position)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    streams=st.sampled_from([8, 16, 24]),
    window=st.integers(1, 3),
    phases=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4)), max_size=5),
)
def test_phases_on_any_numbers_of_ranks_are_one_run(sizes, streams, window, phases):
    """Each phase begins where the one before ended, with new processes and other ranks."""
    dataset, start, found = Places(sizes, streams, window), 0, []
    for world, count in phases:
        ranks = [
            batches(
                Places(sizes, streams, window), batch_size=16, micro_batch=16 // world, rank=rank,
                world=world, start=start, workers=0, collate=list,
            )
            for rank in range(world)
        ]  # fmt: skip
        for _ in range(count):
            found.append(sorted(place for rank in ranks for place in next(rank)))
        start += 16 * count
    whole = [dataset[p] for p in range(start)]
    assert found == [sorted(whole[i : i + 16]) for i in range(0, start, 16)]
    total = sum(sizes)
    for epoch in range(start // total):
        one = whole[epoch * total : (epoch + 1) * total]
        assert len(set(one)) == total and {place.epoch for place in one} == {epoch}
