"""Run folders that cannot be written or are not shared, and shards that cannot be read."""

import os
from pathlib import Path

import pytest
import tiny_run
import wards

from dalle_dist.distributed import process_group
from dalle_dist.doctor import folders, reading
from dalle_dist.testing import run_distributed


def look(name, config):
    return wards.rows(process_group.init(), [name], config)


def all_below(folder):
    return sorted(str(path) for path in Path(folder).rglob("*"))


def test_a_run_folder_is_written_and_nothing_stays(tmp_path):
    config = wards.config_of(tmp_path / "not/yet")
    ((_, verdict, found, _),) = look("run folder", config)
    assert verdict == "ok" and found == f"{config.paths.run}: written, read, deleted"
    assert not all_below(tmp_path)


def test_what_lay_in_the_run_folder_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("{}")
    assert look("run folder", wards.config_of(tmp_path))[0][1] == "ok"
    assert all_below(tmp_path) == [str(tmp_path / "run"), str(tmp_path / "run/log.jsonl")]


@pytest.mark.parametrize("folder", ["/proc/doctor", "{tmp}/file"])
def test_a_folder_that_cannot_be_written_fails(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    config = wards.config_of(folder.format(tmp=tmp_path))
    ((_, verdict, found, _),) = look("run folder", config)
    assert verdict == "FAIL" and "could not be written" in found
    assert all_below(tmp_path) == [str(tmp_path / "file")]


def test_a_store_that_returns_something_else_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_content", lambda path: "something else")
    ((_, verdict, found, _),) = look("run folder", wards.config_of(tmp_path))
    assert verdict == "FAIL" and "holds something else" in found
    assert not all_below(tmp_path)


def test_a_bucket_is_written_and_nothing_stays(bucket):
    from dalle_dist import storage

    ((_, verdict, _, _),) = look("run folder", wards.config_of(bucket))
    assert verdict == "ok" and storage.list_files(bucket) == []
    assert not all_below(os.environ["DALLE_DIST_CACHE"])
    ((_, verdict, found, _),) = look("run folder", wards.config_of(f"{bucket}-other"))
    assert verdict == "FAIL" and f"{bucket}-other" in found


class Apart:
    """Each host has a folder of its own at the same path: here at another, of the rank's name."""

    def __init__(self, folder, shared=False):
        self.folder, self.shared = folder, shared

    def __call__(self, rank):
        wards.own_host(rank)
        return wards.config_of(self.folder if self.shared else f"{self.folder}/{rank}")


def test_a_folder_that_hosts_do_not_share_fails(tmp_path):
    for rows in run_distributed(wards.rows, 3, ["run folder"], None, Apart(tmp_path)):
        ((_, verdict, found, _),) = rows
        assert verdict == "FAIL"
        assert found.endswith("/run of rank 0 is not that of n1 (rank 1), n2 (rank 2)")
    assert not all_below(tmp_path)


def test_a_shared_folder_is_fine(tmp_path):
    rows = run_distributed(wards.rows, 3, ["run folder"], None, Apart(tmp_path, shared=True))[0]
    assert rows[0][1:3] == ("ok", f"{tmp_path}/run: by 3 hosts")
    assert not all_below(tmp_path)


@pytest.fixture
def shards(tmp_path):
    return tiny_run.make(tmp_path)


def test_reading_is_measured(shards):
    ((_, verdict, found, _),) = look("read speed", shards)
    assert verdict == "ok"
    assert float(found.split()[0].replace(",", "")) > 0


def test_shards_of_a_bucket_are_read(shards, bucket):
    from dalle_dist import storage

    storage.publish_folder(Path(shards.paths.tokens), f"{bucket}/tokens")
    config = tiny_run.with_paths(shards, tokens=f"{bucket}/tokens")
    assert look("read speed", config)[0][1] == "ok"


def test_no_shards_are_no_fault(tmp_path):
    ((_, verdict, found, _),) = look("read speed", wards.config_of(tmp_path))
    assert verdict == "skip" and found == f"no shards at {tmp_path}/tokens/train yet"


@pytest.mark.parametrize("kept", [None, 1000])
def test_a_missing_or_short_shard_fails(shards, kept):
    first = min(Path(shards.paths.tokens, "train").glob("*.tar"))
    if kept is None:
        first.unlink()
    else:
        os.truncate(first, kept)
    ((_, verdict, found, _),) = look("read speed", shards)
    assert verdict == "FAIL" and str(first) in found


def slow_reader(rank):
    wards.own_host(rank)
    reading.measure = lambda folder, number: 1e6 if rank == 2 else 9e6 + number


def test_the_host_that_reads_slowly_is_named(shards):
    for rows in run_distributed(wards.rows, 4, ["read speed"], shards, slow_reader):
        ((_, verdict, found, _),) = rows
        assert (verdict, found) == ("warn", "1 MB/s, least on n2 (rank 2); median 9")
