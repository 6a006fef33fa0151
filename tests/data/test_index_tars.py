"""Tars that were made elsewhere are read, trained on and verified where they lie."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import webdataset
from packed import pack
from PIL import ExifTags, Image

from dalle_dist import storage
from dalle_dist.cli import main
from dalle_dist.data.image_dataset import ImageDataset
from dalle_dist.data.shards import ShardIndex, ShardSet, ShardWriter


@pytest.fixture
def img2dataset(image):
    """A folder of tars as img2dataset leaves it, its statistics included."""

    def make(folder, tars=3, each=4):
        for t in range(tars):
            files = []
            for i in range(each):
                key, about = f"{t:05d}{i:04d}", {"caption": f"picture {t} {i}", "width": 999}
                files.append((f"{key}.jpg", image(size=(8 + i, 8), format_="JPEG")))
                files.append((f"{key}.json", json.dumps(about).encode()))
                files.append((f"{key}.txt", f"picture {t} {i}".encode()))
            pack(folder / f"{t:05d}.tar", files)
            (folder / f"{t:05d}_stats.json").write_text("{}")
            (folder / f"{t:05d}.parquet").write_bytes(b"")
        return folder

    return make


def indexed(*arguments, processes="1"):
    return main(["data", "index", *map(str, arguments), "--processes", processes])


def verified(folder):
    return main(["data", "verify", str(folder), "--processes", "1", "--decode"])


def tars(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.tar")}


def read(folder):
    shards = ShardSet(str(folder), "images")
    found = [shards.read(i) for i in range(len(shards))]
    return {sample["__key__"].decode(): sample for sample in found}


def test_a_folder_gets_its_index_and_the_tars_stay_as_they_are(tmp_path, img2dataset, capsys):
    folder = img2dataset(tmp_path / "tars")
    before = tars(folder)
    assert indexed(folder) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder}: 12 images"]
    assert tars(folder) == before
    assert not (folder / "unfinished").exists()
    shards = ShardSet(str(folder), "images")
    assert shards.sizes.tolist() == [4, 4, 4]
    assert shards.captions(1) == [f"picture 1 {i}" for i in range(4)]
    assert shards.column(0, "width") == [8, 9, 10, 11]  # of the images, not as the json says
    for i in (0, 5, 11):
        expected = webdataset.WebDataset(str(folder / f"{i // 4:05d}.tar"), shardshuffle=False)
        (wanted,) = [s for n, s in enumerate(expected) if n == i % 4]
        found = shards.read(i)
        assert found["__key__"].decode() == wanted["__key__"]
        assert {k: v for k, v in found.items() if k[0] != "_"} == {
            k: v for k, v in wanted.items() if k[0] != "_"
        }
    assert verified(folder) == 0
    assert main(["data", "inspect", str(folder)]) == 0


def test_whole_tars_are_held_out_and_nothing_is_copied(tmp_path, img2dataset, capsys):
    source, out = img2dataset(tmp_path / "tars", 5), tmp_path / "set"
    assert indexed(source, out, "--held-out", "0.4", processes="2") == 0
    assert not tars(out)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{out}/train: 12 images", f"{out}/held-out: 8 images"]
    train, held_out = read(out / "train"), read(out / "held-out")
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 20
    for part in ("train", "held-out"):
        names = [info.name for info in ShardIndex.load(str(out / part)).shards]
        assert all(name.startswith(f"{source}/") for name in names)
        assert ShardSet(str(out / part)).index.meta == {"source": "tars"}
        assert len(list((out / part).glob("0000*-*.samples.parquet"))) == len(names)
    assert verified(out) == 0
    data = ImageDataset(str(out / "train"), None, 8, None, 0)
    assert len(data) == 12 and data[0].image_CHW.shape == (3, 8, 8)
    assert indexed(source, out) == 2
    assert "holds shards already" in capsys.readouterr().err


def test_tars_of_one_base_name_in_two_folders(tmp_path, img2dataset, capsys):
    for name in ("a", "b"):
        img2dataset(tmp_path / "tars" / name, 1)
    assert indexed(tmp_path / "tars", tmp_path / "set") == 0
    assert "keys are counted anew in each tar" in capsys.readouterr().out
    assert len(read(tmp_path / "set/train")) == len(read(tmp_path / "set/held-out")) == 4
    assert indexed(tmp_path / "tars") == 0
    shards = ShardSet(str(tmp_path / "tars"), "images")
    assert [info.name for info in shards.index.shards] == ["a/00000.tar", "b/00000.tar"]
    assert len(list((tmp_path / "tars").glob("00000-*.samples.parquet"))) == 2
    assert shards.read(6)["txt"] == b"picture 0 2"


def test_odd_names_are_split_as_webdataset_does(tmp_path, image):
    picture, long = image(format_="JPEG"), "a" * 90 + "/" + "b" * 90
    names = [
        "sub/x.jpg",
        "sub/x.seg.png",
        "sub/x.txt",
        "other/x.jpg",
        f"{long}.jpg",
        "猫.jpg",
        "Z.JPG",
    ]
    files = [(name, picture if name.lower().endswith("jpg") else b"text") for name in names]
    for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        pack(tmp_path / "t.tar", files, format_)
        shutil.rmtree(tmp_path / "unfinished", ignore_errors=True)
        assert indexed(tmp_path) == 0
        found = read(tmp_path)
        expected = webdataset.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False)
        assert [(key, sorted(found[key])) for key in found] == [
            (s["__key__"], sorted(k for k in s if k not in ("__url__", "__local_path__")))
            for s in expected
        ]
        assert verified(tmp_path) == 0


def test_a_name_that_begins_with_a_dot_and_a_slash(tmp_path, image):
    pack(tmp_path / "t.tar", [("./a.png", image()), ("./a.txt", b"told")])
    assert indexed(tmp_path) == 0
    assert read(tmp_path)["a"]["txt"] == b"told"
    assert verified(tmp_path) == 0


def test_the_size_of_an_image_is_that_which_a_viewer_shows(tmp_path):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    pack(tmp_path / "t.tar", [("a.jpg", buffer.getvalue()), ("a.txt", b"told")])
    assert indexed(tmp_path) == 0
    shards = ShardSet(str(tmp_path))
    assert (shards.column(0, "width"), shards.column(0, "height")) == ([10], [20])


def test_what_is_left_out_is_counted(tmp_path, image, capsys):
    picture = image()
    files = [("a.png", picture), ("a.txt", b"told"), ("b.txt", b"told"), ("c.tiff", picture)]
    files += [("d.png", b"no image"), ("e.png", picture), ("e.PNG", picture), (".f.png", picture)]
    files += [("README", b""), ("a.png", picture)]
    pack(tmp_path / "t.tar", files)
    with tarfile.open(tmp_path / "t.tar", "a") as tar:
        link = tarfile.TarInfo("g.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    (tmp_path / "u.tar.gz").write_bytes(b"")
    assert indexed(tmp_path) == 0
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    tar = f"{tmp_path}/t.tar"
    assert lines[0].startswith("left out: 1 compressed tars, e.g. u.tar.gz")
    assert set(lines[1:-1]) == {
        f"2 hidden, or without an extension, e.g. {tar}: .f.png",
        f"1 no image (.jpg, .png, .webp), e.g. {tar}: b",
        f"1 an image of another format, which 'data build' converts, e.g. {tar}: c",
        f"1 damaged image, e.g. {tar}: d",
        f"1 a second file of the same extension, e.g. {tar}: e.PNG",
        f"1 a key that the tar has already, e.g. {tar}: a",
        f"1 not a plain file, e.g. {tar}: g.png",
        f"1 kept, but without a caption (.txt), e.g. {tar}: e",
    }
    assert lines[-1] == f"{tmp_path}: 2 images"
    assert list(read(tmp_path)) == ["a", "e"]
    assert verified(tmp_path) == 0


def test_of_a_damaged_tar_the_samples_before_are_used(tmp_path, img2dataset, capsys):
    folder = img2dataset(tmp_path / "tars")
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: 8 * 1024])
    (folder / "00002.tar").write_bytes(b"no tar at all")
    assert indexed(folder) == 0
    out = capsys.readouterr().out
    assert re.search(r"damaged \S+/00001.tar: (unexpected end|ends too).*; 2 samples before", out)
    assert f"damaged {folder}/00002.tar: " in out and "; 0 samples before" in out
    assert ShardSet(str(folder)).sizes.tolist() == [4, 2]
    assert verified(folder) == 0


def test_nothing_usable_leaves_the_tars_and_an_earlier_index(tmp_path, img2dataset, capsys):
    folder = img2dataset(tmp_path / "tars")
    before = tars(folder)
    assert indexed(folder, "--kind", "tokens") == 2
    assert "no samples of tokens in the tars: 12 no codes (.npy), e.g." in capsys.readouterr().err
    assert tars(folder) == before and not (folder / "index.json").exists()
    assert indexed(folder) == 0
    index = (folder / "index.json").read_bytes()
    assert indexed(folder, "--kind", "tokens") == 2
    assert tars(folder) == before and (folder / "index.json").read_bytes() == index
    assert verified(folder) == 0


def test_a_part_without_samples_leaves_nothing_of_the_set(tmp_path, img2dataset, capsys):
    source = img2dataset(tmp_path / "tars", 2)
    (source / "00001.tar").write_bytes(b"no tar at all")
    before = tars(source)
    assert indexed(source, tmp_path / "set") == 2
    assert "no samples of images in the tars of " in capsys.readouterr().err
    assert tars(source) == before and not (tmp_path / "set").exists()


def test_folders_without_tars_and_a_single_tar_are_one_line(tmp_path, img2dataset, capsys):
    assert indexed(tmp_path / "none") == 2
    assert "no such folder, or no .tar in it; 'dalle-dist data build'" in capsys.readouterr().err
    assert indexed(img2dataset(tmp_path / "one", 1), tmp_path / "out") == 2
    assert "one tar, of which none can be held out" in capsys.readouterr().err
    assert indexed(tmp_path / "one", tmp_path / "out", "--held-out", "1.5") == 2
    assert "--held-out 1.5: between 0 and 1" in capsys.readouterr().err
    (tmp_path / "one/index.json").write_text("[]")
    assert indexed(tmp_path / "one") == 2
    assert "index.json: not an index of shards" in capsys.readouterr().err


def test_shards_of_an_earlier_version_keep_their_kind_and_meta(tmp_path, capsys):
    meta = {"image_tokenizer": "0123", "grid": 2, "codebook_size": 8, "captions": "random-line"}
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(4, np.uint16))
    for part in ("train", "held-out"):
        folder = tmp_path / part
        with ShardWriter(str(folder), "tokens", meta, 2) as writer:
            for i in range(3):
                writer.write(f"{part}{i}", {"npy": buffer.getvalue(), "txt": b"a\nb"})
        index = json.loads((folder / "index.json").read_text())
        for shard in index["shards"]:
            del shard["side_bytes"], shard["side_sha256"]
        expected = tars(folder)
        (folder / "index.json").write_text(json.dumps(index))
        for side in folder.glob("*.parquet"):
            side.unlink()
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert f"'dalle-dist data index {tmp_path}/train' makes it anew" in capsys.readouterr().err
    assert indexed(tmp_path) == 0
    shards = ShardSet(str(tmp_path / "held-out"), "tokens")
    assert shards.index.meta == meta and shards.captions(0) == ["a\nb"] * 2
    assert tars(tmp_path / "held-out") == expected
    assert verified(tmp_path) == 0


def test_tars_in_a_bucket(bucket, tmp_path, img2dataset):
    local, folder = img2dataset(tmp_path / "tars"), storage.join(bucket, "tars")
    for path in local.iterdir():
        storage.write_bytes(storage.join(folder, path.name), path.read_bytes())
    assert indexed(folder, tmp_path / "set", processes="2") == 0
    assert indexed(folder) == 0
    assert indexed(local) == 0
    assert ShardIndex.load(folder).shards == ShardIndex.load(str(local)).shards
    assert len(read(folder)) == 12
    assert len(read(tmp_path / "set/train")) == 8
    assert ShardSet(str(tmp_path / "set/train")).remote
    assert verified(folder) == verified(tmp_path / "set") == 0


def test_a_job_that_is_killed_goes_on(tmp_path, img2dataset):
    source = img2dataset(tmp_path / "tars", 60, 40)
    shutil.copytree(source, tmp_path / "same" / "tars")
    same = tmp_path / "same" / "tars"
    assert indexed(same) == 0
    command = [sys.executable, "-m", "dalle_dist", "data", "index", str(source), "--processes", "2"]
    for wanted in (5, 20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while len(list(source.glob("unfinished/0*.json"))) < wanted and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate()  # which ends when its workers have gone too
    made = {p.name: p.stat().st_mtime_ns for p in source.glob("unfinished/0*.json")}
    assert 5 <= len(made) < 60
    sides = {name: (source / f"{name[:5]}.samples.parquet").stat().st_mtime_ns for name in made}
    (source / ".part-killed").touch()  # as a process leaves it that is killed while it writes
    assert indexed(source) == 0
    for name, time_ in sides.items():
        assert (source / f"{name[:5]}.samples.parquet").stat().st_mtime_ns == time_
    assert (source / "index.json").read_bytes() == (same / "index.json").read_bytes()
    assert not (source / "unfinished").exists()
    assert not [p.name for p in source.iterdir() if p.name.startswith(".")]


def test_an_unfinished_job_of_other_options_is_one_line_that_keeps_the_tars(
    tmp_path, img2dataset, capsys, monkeypatch
):
    folder = img2dataset(tmp_path / "tars")
    with monkeypatch.context() as patch:
        patch.setattr("dalle_dist.data.shard_job.Job.finish", lambda *_: None)
        assert indexed(folder) == 0
    assert indexed(folder, "--kind", "tokens") == 2
    assert "delete unfinished/ in it, or repeat that command" in capsys.readouterr().err
    assert indexed(folder) == 0 and verified(folder) == 0
