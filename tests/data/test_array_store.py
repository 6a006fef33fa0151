"""Finished parts: kept by their digest, refused when damaged, removed without those of others."""

import numpy as np
import pytest

from dalle_dist.data.array_store import ArrayStore
from dalle_dist.errors import DataError


@pytest.mark.parametrize("place", ["local", "s3"])
def test_parts_are_kept_and_only_the_named_ones_removed(request, tmp_path, place):
    folder = str(tmp_path / "parts")
    if place == "s3":
        folder = request.getfixturevalue("bucket") + "/parts"
    store = ArrayStore(folder)
    for digest in ("aa", "bb"):
        store.write_part(digest, numbers=np.arange(3), name=digest)
    assert "aa" not in store and "aa" in ArrayStore(folder) and "cc" not in ArrayStore(folder)
    found = store.read_part("bb")
    assert found["numbers"].tolist() == [0, 1, 2] and str(found["name"]) == "bb"
    store.remove(["aa", "cc"])
    assert "aa" not in ArrayStore(folder) and "bb" in ArrayStore(folder)
    store.remove(["bb"])
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("keep", [0, 30, -5])
def test_a_damaged_part_is_one_line(tmp_path, keep):
    ArrayStore(str(tmp_path)).write_part("aa", numbers=np.arange(300))
    path = tmp_path / "aa.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"aa\.npz: is damaged; remove it"):
        ArrayStore(str(tmp_path)).read_part("aa")
