"""Tars in WebDataset's layout: img2dataset's and others'."""

import gzip
import io
import json
import tarfile

import pytest
from made import build, captions, samples, skipped

from dalle_dist import storage


def tar_of(members, mode="w"):
    """The bytes of a tar with (name, content) as its members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def img2dataset(image, shard, count=4):
    about = json.dumps({"url": "http://example.com", "caption": "in JSON"}).encode()
    for i in range(count):
        key = f"{shard:05d}{i:04d}"
        yield f"{key}.jpg", image(format_="JPEG")
        yield f"{key}.txt", f"caption {shard} {i}".encode()
        yield f"{key}.json", about


@pytest.fixture
def laion(tmp_path, image):
    root = tmp_path / "laion"
    root.mkdir()
    for shard in range(3):
        (root / f"{shard:05d}.tar").write_bytes(tar_of(img2dataset(image, shard)))
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (root / f"{shard:05d}_stats.json").write_text("{}")
    return root


def test_img2dataset_keeps_its_keys(laion, tmp_path, capsys):
    assert build(laion, tmp_path / "out") == 0
    assert captions(tmp_path / "out") == {
        f"{shard:05d}{i:04d}": f"caption {shard} {i}" for shard in range(3) for i in range(4)
    }
    assert len(captions(tmp_path / "out", "held-out")) >= 1
    ends = ("parquet", "_stats.json")
    assert skipped(tmp_path / "out") == {
        f"{shard:05d}{'.' if end == 'parquet' else ''}{end}": "a file beside the tars"
        for shard in range(3)
        for end in ends
    }


def test_a_truncated_tar_is_one_line_and_gives_what_is_whole(laion, tmp_path):
    path = laion / "00001.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmember("000010002.jpg").offset_data
        told = tar.getmember("000010002.txt").offset_data
        ends = tar.getmember("000010002.json").offset_data + 512
    cuts = ((third + 10, 2), (third - 700, 2), (told + 3, 2), (ends, 3), (ends + 100, 3), (5, 0))
    for cut, left in cuts:
        path.write_bytes(data[:cut])
        out = tmp_path / str(cut)
        assert build(laion, out) == 0
        assert len(captions(out)) == 8 + left
        others = {name: why for name, why in skipped(out).items() if "beside" not in why}
        assert list(others) == ["00001.tar"] and others["00001.tar"].startswith("damaged: ")


def test_a_damaged_head_in_the_middle_is_told(laion, tmp_path):
    path = laion / "00002.tar"
    with tarfile.open(path) as tar:
        head = tar.getmember("000020001.jpg").offset
    data = bytearray(path.read_bytes())
    data[head : head + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    assert build(laion, tmp_path / "out") == 0
    assert skipped(tmp_path / "out")["00002.tar"] == "damaged: ends too early"
    assert len(captions(tmp_path / "out")) == 9


def test_tars_of_others(tmp_path, image):
    root = tmp_path / "others"
    (root / "sub").mkdir(parents=True)
    members = [
        *(("./a/000.PNG", image()), ("./a/000.txt", b"zero")),
        *(("b/000.webp", image(format_="WEBP")), ("b/000.json", b'{"caption": "one"}')),
        *(("002.gif", image(format_="GIF")), ("002.cls", b"3"), ("002.txt", "un café".encode())),
        *(("003.txt", b"alone"), ("004.cls", b"4"), ("005.jpg", b"bad"), ("005.txt", b"bad")),
        *((".DS_Store", b""), ("006.jpg", image(format_="JPEG"))),
    ]
    (root / "x.tar").write_bytes(tar_of(members))
    (root / "sub" / "x.tar.gz").write_bytes(gzip.compress(tar_of(members[:4])))
    (root / "z.tar").write_bytes(b"no tar")
    assert build(root, tmp_path / "out") == 0
    assert captions(tmp_path / "out") == {
        "x__a__000": "zero",
        "x__b__000": "one",
        "x__002": "un café",
        "sub__x__a__000": "zero",
        "sub__x__b__000": "one",
    }
    assert "png" in samples(tmp_path / "out")["x__002"]
    told = skipped(tmp_path / "out")
    assert told.pop("z.tar").startswith("damaged: ")
    assert told == {
        "x.tar/003": "caption without an image",
        "x.tar/004": "not a picture",
        "x.tar/005": "not a picture",
        "x.tar/006": "no caption",
        "x.tar/.DS_Store": "hidden, or a system's own file",
    }


def test_the_same_key_twice_in_a_tar_is_two_samples(tmp_path, image):
    pair = [("k.png", image()), ("k.txt", b"one")]
    other = [("l.png", image()), ("l.txt", b"two")]
    (tmp_path / "t.tar").write_bytes(tar_of([*pair, *other, *pair]))
    assert build(tmp_path / "t.tar", tmp_path / "out") == 0
    assert sorted(captions(tmp_path / "out").values()) == ["one", "one", "two"]


def test_a_sample_stays_in_its_part_when_tars_are_added(laion, tmp_path, image):
    assert build(laion, tmp_path / "a", "--held-out", "0.4") == 0
    (laion / "00003.tar").write_bytes(tar_of(img2dataset(image, 3)))
    assert build(laion, tmp_path / "b", "--held-out", "0.4") == 0
    few, more = (set(captions(tmp_path / out, "held-out")) for out in "ab")
    assert few and few == {key for key in more if not key.startswith("00003")}


def test_tars_of_a_bucket(laion, bucket):
    for path in laion.iterdir():
        storage.write_bytes(f"{bucket}/in/{path.name}", path.read_bytes())
    assert build(f"{bucket}/in", f"{bucket}/out") == 0
    assert len(captions(f"{bucket}/out")) == 12


def test_captions_of_tars_come_from_tars(laion, tmp_path, capsys):
    assert build(laion, tmp_path / "out", "--captions-from", "folder") == 2
    assert "--captions-from folder" in capsys.readouterr().err
