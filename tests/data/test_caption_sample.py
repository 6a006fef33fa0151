"""Which captions a tokenizer is trained on, and that it touches no picture for them."""

import pytest

from dalle_dist import storage
from dalle_dist.cli import main
from dalle_dist.data import caption_sample
from dalle_dist.data.caption_sample import CaptionSample
from dalle_dist.data.shards import ShardSet, ShardWriter
from dalle_dist.text_tokenizer.bpe import Tokenizer


def write(folder, count=100, per_shard=10, meta=None, caption="caption {}"):
    with ShardWriter(str(folder), "images", meta or {}, per_shard) as writer:
        for i in range(count):
            writer.write(f"{i:03d}", {"png": b"", "txt": caption.format(i).encode()})
    return ShardSet(str(folder), "images")


def test_all_captions_are_taken_in_their_order_when_there_are_not_more(tmp_path):
    shards = write(tmp_path, 25)
    for most in (25, 10_000):
        sample = CaptionSample(shards, most, 0)
        assert list(sample) == [f"caption {i}" for i in range(25)]
        assert str(sample) == "25 of 25 captions"


def test_a_sample_is_spread_evenly_and_depends_on_the_seed_alone(tmp_path):
    shards = write(tmp_path)
    taken = list(CaptionSample(shards, 30, 1))
    assert taken == list(CaptionSample(ShardSet(str(tmp_path), "images"), 30, 1))
    assert taken != list(CaptionSample(shards, 30, 2))
    assert len(set(taken)) == 30
    shard_of = [int(caption.split()[1]) // 10 for caption in taken]
    assert [shard_of.count(shard) for shard in range(10)] == [3] * 10


def test_of_many_shards_only_some_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_sample, "SHARDS", 4)
    shards, read = write(tmp_path), []
    monkeypatch.setattr(
        shards, "captions", lambda shard: read.append(shard) or ShardSet.captions(shards, shard)
    )
    sample = CaptionSample(shards, 20, 0)
    assert len(set(sample)) == 20
    assert len(read) == 4 and sorted(shard * 4 // 10 for shard in read) == [0, 1, 2, 3]
    assert str(sample) == "20 of 100 captions, from 4 of 10 shards"
    assert len(set(CaptionSample(shards, 70, 0))) == 70  # which four shards do not hold


def test_all_lines_of_a_sample_with_several_captions_count(tmp_path):
    meta = {"captions": "random-line"}
    shards = write(tmp_path, 20, 5, meta, "one {0}\n\ntwo {0}\nthree {0}\n")
    everything = CaptionSample(shards, 10**7, 0)
    assert str(everything) == "60 of 60 captions"
    assert set(everything) == {f"{n} {i}" for i in range(20) for n in ("one", "two", "three")}
    few = list(CaptionSample(shards, 12, 0))
    assert len(few) == 12 and set(few) < set(everything)


def assert_trains(folder, capsys, *options):
    """The verb on a set of images: what it says, and the tokenizer's fingerprint."""
    paths = [f"paths.images={folder}", f"paths.tokenizer={folder}/tokenizer.json"]
    assert main(["tokenizer", "train", "emoji", *paths, "tokenizer.vocab_size=300", *options]) == 0
    said = capsys.readouterr().out.splitlines()
    return said[0], Tokenizer.load(f"{folder}/tokenizer.json").fingerprint


def test_the_verb_reads_side_files_alone(tmp_path, capsys):
    write(tmp_path / "train")
    for tar in (tmp_path / "train").glob("*.tar"):
        tar.unlink()
    said, whole = assert_trains(tmp_path, capsys)
    assert said == "trained on 100 of 100 captions"
    said, part = assert_trains(tmp_path, capsys, "--captions", "2e1")
    assert said == "trained on 20 of 100 captions" and part != whole
    assert assert_trains(tmp_path, capsys, "--captions", "20") == (said, part)


def test_of_a_remote_set_only_side_files_are_fetched(bucket, capsys):
    folder = storage.join(bucket, "set")
    write(storage.join(folder, "train"), 20)
    said, _ = assert_trains(folder, capsys)
    assert said == "trained on 20 of 20 captions"
    copies = [path.name for path in storage.cache_folder().glob("objects/*/*")]
    assert sum(name.endswith(".samples.parquet") for name in copies) == 2
    assert not [name for name in copies if name.endswith(".tar")]


def test_a_damaged_side_file_is_one_line(tmp_path, capsys):
    write(tmp_path / "train")
    (tmp_path / "train/00004.samples.parquet").unlink()
    assert main(["tokenizer", "train", "emoji", f"paths.images={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "00004.samples.parquet: no such file" in line


def test_captions_that_are_no_number_are_refused(capsys):
    for wrong in ("0", "-3", "1.5", "many", "nan", "inf"):
        with pytest.raises(SystemExit, match="2"):
            main(["tokenizer", "train", "emoji", "--captions", wrong])
        assert "at least 1, e.g. 200000 or 10e6" in capsys.readouterr().err
