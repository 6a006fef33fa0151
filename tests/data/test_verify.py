"""Each way in which shards can be bad is a line that names the shard, and the status is 2."""

import errno
import hashlib
import io
import json
import os
import re

import numpy as np
import pytest

from dalle_dist import storage
from dalle_dist.cli import main
from dalle_dist.data.shards import ShardWriter


@pytest.fixture
def write(image):
    def write_(folder, count=9, kind="images", **files):
        with ShardWriter(str(folder), kind, {"grid": 2, "codebook_size": 8}, 3) as shards:
            for i in range(count):
                sample = {"png": image(), "txt": b"caption"} if kind == "images" else {}
                shards.write(f"{i:03d}", sample | files)
        return folder

    return write_


def verified(capsys, folder, *options, processes="1"):
    """(status, lines on stdout, lines on stderr without the bars)."""
    status = main(["data", "verify", str(folder), "--processes", processes, *options])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("dalle-dist: error")]
    return status, said.out.splitlines(), errors


def flip(path, at=600):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(folder, **fields):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1].update(fields)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("processes", ["1", "2"])
def test_sound_shards_of_both_parts(tmp_path, write, capsys, processes):
    write(tmp_path / "train")
    write(tmp_path / "held-out", 2)
    status, lines, errors = verified(capsys, tmp_path, "--decode", processes=processes)
    assert (status, errors) == (0, [])
    assert lines == [
        f"{tmp_path}/train: 9 images in 3 shards are sound",
        f"{tmp_path}/held-out: 2 images in 1 shards are sound",
    ]


DAMAGE = {
    "one bit": (lambda f: flip(f / "00001.tar"), r"00001.tar: sha256 differs from the index"),
    "one bit of a side file": (
        lambda f: flip(f / "00001.samples.parquet", 40),
        r"00001.samples.parquet: sha256 differs from the index",
    ),
    "truncated": (lambda f: os.truncate(f / "00001.tar", 1000), "00001.tar: 1000 bytes, the index"),
    "no tar": (lambda f: (f / "00001.tar").unlink(), "00001.tar: no such file"),
    "no side file": (
        lambda f: (f / "00001.samples.parquet").unlink(),
        "00001.samples.parquet: no such file",
    ),
    "index: samples": (lambda f: edit(f, samples=2), "00001.tar: 3 samples, the index says 2"),
    "index: bytes": (lambda f: edit(f, bytes=7), "00001.tar: .* bytes, the index says 7"),
    "index: sha256": (lambda f: edit(f, sha256="0" * 64), "00001.tar: sha256 differs"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_bad_shard_is_named(tmp_path, write, capsys, damage, processes):
    do, message = DAMAGE[damage]
    do(write(tmp_path))
    status, (bad,), errors = verified(capsys, tmp_path, processes=processes)
    assert status == 2
    assert re.match(rf"bad: ({re.escape(str(tmp_path))}/)?{message}", bad)
    expected = f"{tmp_path}: 1 of 3 shards are damaged: 00001.tar; fetch or build them again"
    assert errors == [f"dalle-dist: error: {expected}"]


def test_all_bad_shards_of_both_parts_are_named(tmp_path, write, capsys):
    write(tmp_path / "train", 30)
    write(tmp_path / "held-out")
    for number in range(7):
        (tmp_path / f"train/0000{number}.tar").unlink()
    (tmp_path / "held-out/00002.tar").unlink()
    status, lines, (error,) = verified(capsys, tmp_path)
    assert status == 2 and len(lines) == 8
    assert "train: 7 of 10 shards are damaged: 00000.tar, " in error
    assert "00004.tar, ...; fetch or build them again; " in error
    assert "held-out: 1 of 3 shards are damaged: 00002.tar; " in error


def test_keys_of_several_shards_are_told(tmp_path, write, capsys):
    write(tmp_path)
    with ShardWriter(str(tmp_path / "other"), "images", {}, 3) as shards:
        for key in ("001", "002", "x", "y", "y"):
            shards.write(key, {"txt": b""})
    for name in ("00000.tar", "00000.samples.parquet"):
        (tmp_path / "other" / name).replace(tmp_path / f"other-{name}")
    other = json.loads((tmp_path / "other/index.json").read_text())["shards"][0]
    edit(tmp_path, **other | {"name": "other-00000.tar"})
    status, lines, (error,) = verified(capsys, tmp_path)
    assert (status, lines) == (2, [])
    assert "2 keys come more than once" in error
    assert "001 in 00000.tar and other-00000.tar, 002 in 00000.tar and other-00000.tar;" in error
    status, _, (error,) = verified(capsys, tmp_path / "other")
    assert "1 of 2 shards are damaged" in error


def test_a_key_that_comes_twice_in_one_shard_is_told(tmp_path, capsys):
    with ShardWriter(str(tmp_path), "images", {}) as shards:
        for key in "aba":
            shards.write(key, {"txt": b""})
    assert "1 keys come more than once" in verified(capsys, tmp_path)[2][0]
    assert "a in 00000.tar and 00000.tar;" in verified(capsys, tmp_path)[2][0]


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    status, lines, (error,) = verified(capsys, tmp_path)
    assert (status, lines) == (2, []) and f"{tmp_path}: no shards here" in error
    assert "--processes 0: at least 1" in verified(capsys, tmp_path, processes="0")[2][0]


@pytest.mark.parametrize("name", ["index.json", "00001.tar", "00001.samples.parquet"])
def test_a_file_that_may_not_be_read_is_one_line(tmp_path, write, capsys, monkeypatch, name):
    """As root runs the tests: the refusal is made up."""
    write(tmp_path)
    fetch = storage.fetch

    def refused(path, *known):
        if path.endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return fetch(path, *known)

    monkeypatch.setattr(storage, "fetch", refused)
    monkeypatch.setattr(storage, "read_bytes", lambda path: refused(path).read_bytes())
    status, lines, (error,) = verified(capsys, tmp_path)
    told = error if name == "index.json" else lines[0]
    assert status == 2 and told.endswith(f"{tmp_path}/{name}: Permission denied")


def test_a_disk_that_fails_is_told(tmp_path, write, capsys, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    write(tmp_path)
    monkeypatch.setattr(os, "pread", failing)
    status, lines, _ = verified(capsys, tmp_path)
    assert status == 2 and lines[0] == "bad: 00000.tar: Input/output error"


def test_a_side_file_that_is_none_is_told(tmp_path, write, capsys):
    write(tmp_path)
    (tmp_path / "00001.samples.parquet").write_bytes(b"text")
    digest = hashlib.sha256(b"text").hexdigest()
    edit(tmp_path, side_bytes=4, side_sha256=digest)
    status, (line,), _ = verified(capsys, tmp_path)
    assert status == 2 and "00001.samples.parquet: not a side file of a shard" in line


def test_images_that_cannot_be_decoded_are_told_on_request(tmp_path, write, capsys):
    write(tmp_path, png=b"no image")
    assert verified(capsys, tmp_path)[0] == 0
    status, lines, (error,) = verified(capsys, tmp_path, "--decode")
    assert lines[0] == "bad: 00000.tar: 3 samples cannot be decoded, e.g. 000"
    assert status == 2 and "3 of 3 shards are damaged" in error


@pytest.mark.parametrize(
    ("codes", "status"), [([0, 1, 2, 7], 0), ([0, 1, 2, 8], 2), ([0, 1, 2], 2), (None, 2)]
)
def test_codes_are_compared_with_the_grid_and_the_codebook(tmp_path, write, capsys, codes, status):
    buffer = io.BytesIO()
    if codes is not None:
        np.save(buffer, np.array(codes, np.uint16))
    write(tmp_path, kind="tokens", npy=buffer.getvalue())
    assert verified(capsys, tmp_path, "--decode")[0] == status


@pytest.mark.parametrize("processes", ["1", "2"])
def test_remote_shards_are_fetched_anew_and_the_cache_is_left_alone(
    bucket, write, capsys, hurried, processes
):
    folder = storage.join(bucket, "set")
    write(folder)
    assert verified(capsys, folder, processes=processes)[0] == 0
    tar = storage.join(folder, "00001.tar")
    copy = storage.fetch(tar)
    storage.write_bytes(tar, bytes(copy.stat().st_size))
    before = sorted(storage.cache_folder().rglob("*"))
    status, (bad,), (error,) = verified(capsys, folder, processes=processes)
    assert status == 2 and "00001.tar" in bad and "1 of 3 shards are damaged" in error
    assert sorted(storage.cache_folder().rglob("*")) == before
