"""The nearest training images: those of brute force, by any ranks, cut off or not."""

import contextlib
import csv
import shutil

import numpy as np
import pytest
import torch
from copied import (
    COPIES,
    CORRUPT_EVALUATED,
    CORRUPT_TRAINING,
    EVALUATED,
    encoded,
    write,
)
from PIL import Image

from dalle_dist import storage
from dalle_dist.distributed import process_group
from dalle_dist.errors import DataError, UserError
from dalle_dist.overlap.images import ImageSet
from dalle_dist.overlap.job import Job, run
from dalle_dist.testing import run_distributed

COLUMNS = "key", "caption", "nearest_key", "nearest_caption", "similarity"


class Thumbnails:
    """Features of an image: its pixels when it is made very small, less their mean."""

    fingerprint = "f" * 16

    def __init__(self, fail_after=None):
        self.calls, self._fail_after = 0, fail_after

    def image_features(self, images):
        if self.calls == self._fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        return torch.stack([torch.from_numpy(thumbnail(image)).float() for image in images])


def thumbnail(image):
    small = np.asarray(image.resize((6, 6), Image.Resampling.BOX), dtype=np.float64)
    return (small - small.mean()).ravel()


def look_up(ranks, sets, out, options, encoder=None):
    encoder = encoder or Thumbnails()
    job = Job(*map(ImageSet, sets), Thumbnails.fingerprint, str(out), **options)
    found = run(job, encoder, ranks)
    return len(found.evaluated_Q), found.nearest.corrupt


def alone(sets, out, encoder=None, **options):
    return look_up(process_group.init(), sets, out, options, encoder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(folder):
    with (folder / "overlap.csv").open(newline="") as text:
        rows = list(csv.reader(text))
    assert tuple(rows[0]) == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:]]


def brute_force(sets):
    """(key of the evaluated image, key of the nearest, cosine), in double precision."""
    evaluated, training = map(ImageSet, sets)
    units = []
    for images in (evaluated, training):
        whole = [(i, images.image(i)) for i in range(len(images)) if images.image(i) is not None]
        features = {images.label(i).key: thumbnail(image) for i, image in whole}
        units.append({key: one / np.linalg.norm(one) for key, one in features.items()})
    for key, one in units[0].items():
        near = {other: float(one @ unit) for other, unit in units[1].items()}
        best = max(near, key=near.__getitem__)  # the first of those that are equal
        yield key, best, near[best]


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory):
    """A folder of what one process wrote without a threshold."""
    out = tmp_path_factory.mktemp("whole")
    assert alone(sets, out) == (EVALUATED - len(CORRUPT_EVALUATED), len(CORRUPT_TRAINING))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_the_nearest_are_those_of_brute_force(sets, whole):
    expected = {key: (nearest, cosine) for key, nearest, cosine in brute_force(sets)}
    rows = table(whole)
    assert {row["key"] for row in rows} == expected.keys() and len(rows) == len(expected)
    for row in rows:
        nearest, cosine = expected[row["key"]]
        assert row["nearest_key"] == nearest
        assert float(row["similarity"]) == pytest.approx(cosine, abs=1e-5)
        number = int(row["nearest_key"].lstrip("t"))
        assert row["nearest_caption"] == f"t, picture <{number}>"
        assert row["caption"] == f"e, picture <{int(row['key'].lstrip('e'))}>"
    similarities = [float(row["similarity"]) for row in rows]
    assert similarities == sorted(similarities, reverse=True)


def test_copies_are_the_nearest_and_come_first(whole):
    first = table(whole)[: len(COPIES)]
    copies = {f"e{copy:04d}": f"t{origin:04d}" for copy, (origin, _) in COPIES.items()}
    assert {row["key"]: row["nearest_key"] for row in first} == copies
    assert all(float(row["similarity"]) > 0.99 for row in first)


def test_ranks_and_chunks_do_not_change_a_byte(sets, copy, tmp_path):
    counts = alone(sets, copy, threshold=0.9)
    expected = files(copy)
    assert sorted(expected) == ["keep.txt", "nearest.npz", "overlap.csv", "report.html"]
    for chunk in (64, 640):
        alone(sets, tmp_path / f"{chunk}", threshold=0.9, chunk=chunk)
        assert files(tmp_path / f"{chunk}") == expected
    out, options = tmp_path / "ranks", {"threshold": 0.9, "chunk": 64}
    assert run_distributed(look_up, 2, sets, out, options) == [counts] * 2
    assert files(out) == expected


def test_a_lookup_that_was_cut_off_goes_on_where_it_was(sets, whole, tmp_path):
    cut, goes_on = Thumbnails(fail_after=5), Thumbnails()
    with pytest.raises(KeyboardInterrupt):
        alone(sets, tmp_path / "cut", cut, chunk=64)
    assert len(list((tmp_path / "cut/unfinished").glob("*.npz"))) == 2
    shutil.copytree(tmp_path / "cut", tmp_path / "on two ranks")
    alone(sets, tmp_path / "cut", goes_on, chunk=64)
    assert goes_on.calls == 4  # three blocks of the evaluation set, the last chunk
    run_distributed(look_up, 2, sets, tmp_path / "on two ranks", {"chunk": 64})
    for folder in ("cut", "on two ranks"):
        assert files(tmp_path / folder) == files(whole)
        assert not (tmp_path / folder / "unfinished").exists()


def test_the_folder_may_be_remote(sets, whole, bucket):
    out = f"{bucket}/out"
    for encoder in (Thumbnails(fail_after=5), Thumbnails(), Thumbnails(fail_after=0)):
        with contextlib.suppress(KeyboardInterrupt):
            alone(sets, out, encoder, chunk=64)
    found = {name: storage.read_bytes(f"{out}/{name}") for name in storage.list_files(out)}
    assert found == files(whole)


def test_a_threshold_is_chosen_afterwards_without_looking_anything_up(sets, copy):
    again = Thumbnails()
    alone(sets, copy, again, threshold=0.99)
    assert again.calls == 0
    rows = table(copy)
    expected = sorted(row["key"] for row in rows if float(row["similarity"]) < 0.99)
    assert (copy / "keep.txt").read_text().split() == expected
    assert 0 < len(expected) < len(rows)


def test_a_folder_is_not_used_for_other_sets(sets, copy):
    with pytest.raises(UserError, match="is of other sets or another CLIP"):
        alone(sets[::-1], copy)
    (copy / "nearest.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged; remove it"):
        alone(sets, copy)


@pytest.mark.parametrize("place", [0, 1])
def test_a_set_that_cannot_be_read_is_an_error(sets, tmp_path, place):
    write(tmp_path / "bad", [("png", b"nothing")] * 3, "b")
    pair = list(sets)
    pair[place] = str(tmp_path / "bad")
    with pytest.raises(DataError, match="bad: none of 3 images can be decoded"):
        alone(pair, tmp_path / "out")


def test_equal_images_are_represented_by_the_first(sets, tmp_path):
    write(tmp_path / "one", [("png", encoded(ImageSet(sets[1]).image(90)))], "o")
    for chunk in (64, 192):
        alone((str(tmp_path / "one"), sets[1]), tmp_path / f"{chunk}", chunk=chunk)
        (row,) = table(tmp_path / f"{chunk}")
        assert (row["nearest_key"], float(row["similarity"])) == ("t0020", 1)
