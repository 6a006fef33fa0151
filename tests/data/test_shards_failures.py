"""A build of shards that fails leaves nothing behind, and what was there unchanged."""

import pytest

from dalle_dist.data.shards import ShardWriter
from dalle_dist.errors import DataError


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(RuntimeError),
        ShardWriter(str(tmp_path / "s"), "images", {}, samples_per_shard=2) as writer,
    ):
        for key in "abc":
            writer.write(key, {"txt": b"text"})
        raise RuntimeError("interrupted")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("size", [10, 1 << 20], ids=["noticed at the end", "noticed at once"])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, size):
    """/dev/full answers every write as a full disk does."""
    with (
        pytest.raises(DataError, match=r"could not be written \(the disk is full") as error,
        ShardWriter(str(tmp_path / "s"), "images", {}) as writer,
    ):
        (tmp_path / "s" / ".partial" / "00000.tar").symlink_to("/dev/full")
        writer.write("a", {"png": bytes(size)})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


def test_a_folder_in_use_is_unchanged(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="in use"):
        ShardWriter(str(tmp_path), "images", {})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("index.json", "{}")]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = str(tmp_path / "file" / "train")
    with (
        pytest.raises(DataError, match=r"file/train: could not be written \(Not a directory\)"),
        ShardWriter(folder, "images", {}),
    ):
        pytest.fail("the writer opened")
    assert (tmp_path / "file").read_text() == "not a folder"
