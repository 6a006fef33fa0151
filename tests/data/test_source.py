"""Shards that stay bad: quarantined up to a budget, named, replaced alike whoever reads."""

import pytest

from dalle_dist.data.notes import Notes
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import DamagedShard, ShardWriter
from dalle_dist.data.shards.index import RANDOM_LINE
from dalle_dist.data.source import SampleSource, require_few
from dalle_dist.errors import DataError

SHARDS = 8


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(str(tmp_path / "s"), "images", {}, samples_per_shard=5) as writer:
        for i in range(5 * SHARDS):
            writer.write(f"{i:03d}", {"txt": f"{i}".encode()})
    return tmp_path / "s"


def damage(folder, *shards):
    for shard in shards:
        path = folder / f"{shard:05d}.tar"
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)


def keys(source, positions):
    return [source.read(source.place(p))["__key__"].decode() for p in positions]


def order(streams=4):
    return SampleOrder(0, [5] * SHARDS, streams, 2)


def test_a_bad_shard_stops_the_run_by_default_and_is_named(folder):
    damage(folder, 3)
    source = SampleSource(str(folder), "images", order())
    with pytest.raises(DamagedShard, match=r"00003.tar: .*sha256 .*fetch or build the file again"):
        keys(source, range(40))


def test_others_stand_in_for_a_bad_shard_up_to_the_budget(folder):
    whole = keys(SampleSource(str(folder), "images", order()), range(80))
    damage(folder, 3)
    source = SampleSource(str(folder), "images", order(), bad_shards=1)
    found = keys(source, range(80))
    for before, after in zip(whole, found, strict=True):
        assert (before == after) == (not 15 <= int(before) < 20)
        assert not 15 <= int(after) < 20
    assert list(source.notes.quarantined) == ["00003.tar"]
    assert "sha256" in source.notes.quarantined["00003.tar"]
    damage(folder, 5)
    with pytest.raises(DamagedShard, match=r"2 shards are bad, data.bad_shards allows 1"):
        keys(SampleSource(str(folder), "images", order(), bad_shards=1), range(40))


def test_what_stands_in_does_not_depend_on_who_reads(folder):
    damage(folder, 0, 6)
    source = SampleSource(str(folder), "images", order(), bad_shards=2)
    alone = keys(source, range(80))
    for world in (2, 4):
        for rank in range(world):
            mine = SampleSource(str(folder), "images", order(), bad_shards=2)
            assert keys(mine, range(rank, 80, world)) == alone[rank::world]


def test_a_set_without_one_good_shard_is_an_error(folder):
    damage(folder, *range(SHARDS))
    source = SampleSource(str(folder), "images", order(), bad_shards=100)
    with pytest.raises(DataError, match="no shard of it can be read"):
        keys(source, range(40))


def test_without_an_order_the_next_shard_stands_in(folder):
    damage(folder, 1)
    source = SampleSource(str(folder), "images", None, bad_shards=1)
    assert keys(source, [4, 5, 6, 10]) == ["004", "010", "011", "010"]


def test_the_budget_counts_what_all_ranks_have_found():
    require_few(2, 2, "00001.tar: gone")
    with pytest.raises(DamagedShard, match=r"00001.tar: gone \(3 shards are bad"):
        require_few(3, 2, "00001.tar: gone")


def test_of_several_captions_the_seed_chooses_one(tmp_path):
    with ShardWriter(str(tmp_path / "s"), "images", {"captions": RANDOM_LINE}) as writer:
        writer.write("a", {"txt": b"one\ntwo\n\nthree"})
    source = SampleSource(str(tmp_path / "s"), "images", None)
    chosen = [source.caption("one\ntwo\n\nthree", f"0 {epoch} 0") for epoch in range(60)]
    assert set(chosen) == {"one", "two", "three"}
    assert chosen == [source.caption("one\ntwo\n\nthree", f"0 {epoch} 0") for epoch in range(60)]
    assert source.caption("", "0") == ""


def test_a_sample_is_described_by_key_and_shard(folder):
    source = SampleSource(str(folder), "images", None)
    assert source.describe(7) == f"{folder}: sample 007 of 00001.tar"


def test_notes_add_up_and_are_taken_once():
    notes = Notes({"a"}, {"s": "gone"}, 3, 1, 1)
    notes.add(Notes({"b"}, {}, 2, 0, 1))
    taken = notes.take()
    assert taken == Notes({"a", "b"}, {"s": "gone"}, 5, 1, 2)
    assert notes == Notes() and not notes and taken
