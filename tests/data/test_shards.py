import io
import json
import tarfile
import tracemalloc
from hashlib import sha256

import pytest
import webdataset
from pyarrow import parquet

from dalle_dist.data.shards import (
    DamagedShard,
    ShardIndex,
    ShardInfo,
    ShardSet,
    ShardWriter,
    write_index,
)
from dalle_dist.data.shards.tar_header import made_by_the_library, tar_header
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


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.png", 0), ("000012345.json", 1234567), ("x" * 96 + ".png", 8), ("x" * 97 + ".png", 8),
        ("红色的心.txt", 3), ("folder/a.jpg", 8**11 - 1), ("b.png", 8**11),
    ],
)  # fmt: skip
def test_a_header_is_the_one_that_the_library_makes(name, size):
    assert tar_header(name, size) == made_by_the_library(name, size)
    with tarfile.open(fileobj=io.BytesIO(tar_header(name, 0) + bytes(1024))) as tar:
        assert tar.getnames() == [name]


def test_names_that_no_tar_header_holds_are_read_back(tmp_path):
    keys = ["k" * 120, "红色的心", "plain", "with space"]
    with ShardWriter(str(tmp_path), "images", {}) as writer:
        for key in keys:
            writer.write(key, {"png": key.encode(), "txt": b"of " + key.encode(), "json": b"{}"})
    shards = ShardSet(str(tmp_path), "images")
    shards.verify_all()
    assert [shards.read(i)["png"].decode() for i in range(4)] == keys
    assert [shards.key(i) for i in range(4)] == keys
    assert shards.captions(0) == [f"of {key}" for key in keys]
    found = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == keys


def test_an_index_that_lies_is_found_at_the_sample(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", count=7)
    side = (tmp_path / "two/00001.samples.parquet").read_bytes()  # of samples 3 to 5
    (tmp_path / "one/00000.samples.parquet").write_bytes(side)
    index = json.loads((tmp_path / "one/index.json").read_text())
    index["shards"][0] |= {"side_bytes": len(side), "side_sha256": sha256(side).hexdigest()}
    (tmp_path / "one/index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedShard, match=r"00000.tar: .*; 'dalle-dist data index' makes"):
        ShardSet(str(tmp_path / "one"), "images").read(1)


def test_an_index_of_before_side_files_says_what_to_do(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for shard in index["shards"]:
        del shard["side_bytes"], shard["side_sha256"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"of an earlier version; 'dalle-dist data index "):
        ShardIndex.load(str(tmp_path))


def test_side_files_have_captions_sizes_and_places(tmp_path):
    with ShardWriter(str(tmp_path), "images", {}) as writer:
        writer.write("a", {"png": b"12345", "txt": b"one", "json": b'{"width": 3, "height": 4}'})
        writer.write("b", {"jpg": b"123", "json": b"[]"})
    table = parquet.read_table(tmp_path / "00000.samples.parquet").to_pydict()
    assert (table["key"], table["caption"]) == (["a", "b"], ["one", ""])
    assert (table["width"], table["height"]) == ([3, None], [4, None])
    tar = (tmp_path / "00000.tar").read_bytes()
    for column, row, wanted in (("png", 0, b"12345"), ("jpg", 1, b"123"), ("txt", 0, b"one")):
        offset, size = table[f"{column}.offset"][row], table[f"{column}.bytes"][row]
        assert tar[offset : offset + size] == wanted
    assert table["jpg.offset"][0] is None and table["png.bytes"][1] is None


def test_a_quarter_of_a_million_shards_take_little_memory(tmp_path):
    """Peak of Python's own memory while the index of 250 million samples is loaded."""
    infos = [
        ShardInfo(f"{i:06d}.tar", 7 * 10**7, f"{i:064x}", 1000, 40_000, f"{i + 1:064x}")
        for i in range(250_000)
    ]
    write_index(str(tmp_path), "images", {}, infos)
    del infos
    tracemalloc.start()
    index = ShardIndex.load(str(tmp_path))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.samples == 250_000_000
    assert index.shards[249_999].sha256 == f"{249_999:064x}"
    assert kept < 60e6 and peak < 200e6


def test_a_folder_with_a_colon_in_its_name_is_one_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("data:v1")
    shards = ShardSet("data:v1", "images")
    shards.verify_all()
    assert shards.captions(2) == ["caption 6"]
