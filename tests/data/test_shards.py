import json
import tarfile

import pytest
import webdataset

from dalle_dist.data.shards import ShardIndex, ShardSet, ShardWriter
from dalle_dist.errors import DataError


def write(folder, count=7, per_shard=3, kind="images"):
    with ShardWriter(str(folder), kind, {"a": 1}, samples_per_shard=per_shard) as writer:
        for i in range(count):
            writer.write(f"{i:03d}", {"png": bytes([i]) * i, "txt": f"caption {i}".encode()})


def test_round_trip_and_index(tmp_path):
    write(tmp_path / "s")
    shards = ShardSet(str(tmp_path / "s"), "images")
    assert (len(shards), shards.sizes.tolist(), shards.index.meta) == (7, [3, 3, 1], {"a": 1})
    for i in (6, 0, 3):
        expected = {"__key__": b"%03d" % i, "png": bytes([i]) * i, "txt": b"caption %d" % i}
        assert shards.read(i) == expected
    with pytest.raises(IndexError):
        shards.read(7)
    shards.verify_all()
    names = sorted(p.name for p in (tmp_path / "s").iterdir())
    numbers = ("00000", "00001", "00002")
    shards_and_sides = [n + end for n in numbers for end in (".samples.parquet", ".tar")]
    assert names == [*shards_and_sides, "index.json"]


def test_shards_are_plain_webdataset(tmp_path):
    write(tmp_path)
    found = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["000", "001", "002"]
    assert found[2]["txt"] == b"caption 2"


def test_same_samples_make_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a/index.json").read_text() == (tmp_path / "b/index.json").read_text()


def test_folder_in_use_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="holds shards already"):
        write(tmp_path)


def test_interrupted_writing_is_not_taken_for_whole(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(str(tmp_path), "images", {}) as writer:
        writer.write("a", {"txt": b"a"})
        raise RuntimeError
    with pytest.raises(DataError, match=r"index.json is missing"):
        ShardIndex.load(str(tmp_path))
    assert not (tmp_path / ".partial").exists()


def test_nothing_to_write_is_an_error(tmp_path):
    with (
        pytest.raises(DataError, match="no sample to write"),
        ShardWriter(str(tmp_path), "images", {}),
    ):
        pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "00001.tar").unlink(), r"00001.tar: no such file"),
        (lambda f: (f / "00001.tar").write_bytes(b""), r"00001.tar: 0 bytes, the index says"),
        (lambda f: truncate(f / "00001.tar"), r"00001.tar: \d+ bytes, the index says"),
    ],
)
def test_missing_empty_or_truncated_shard_is_named(tmp_path, damage, message):
    write(tmp_path)
    shards = ShardSet(str(tmp_path), "images")
    damage(tmp_path)
    assert shards.read(0)["txt"] == b"caption 0"
    with pytest.raises(DataError, match=message):
        shards.read(4)


def test_changed_bytes_are_found_by_verify(tmp_path):
    write(tmp_path)
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"00000.tar: sha256 differs"):
        ShardSet(str(tmp_path), "images").verify_all()


def test_tar_with_other_samples_than_the_index_says(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["samples"] = 2
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="3 samples, the index says 2"):
        ShardSet(str(tmp_path), "images").read(0)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert len(tar.getnames()) == 6


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "images"}', "not json"])
def test_damaged_index(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match="not an index of shards"):
        ShardIndex.load(str(tmp_path))


def test_empty_index_and_other_kind(tmp_path):
    (tmp_path / "index.json").write_text('{"kind": "images", "meta": {}, "shards": []}')
    with pytest.raises(DataError, match="lists no samples"):
        ShardIndex.load(str(tmp_path))
    write(tmp_path / "s")
    with pytest.raises(DataError, match="holds shards of images, wanted tokens"):
        ShardSet(str(tmp_path / "s"), "tokens")


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])
