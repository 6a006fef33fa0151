import io
import json

import pytest
from PIL import Image

from dalle_dist import storage
from dalle_dist.data.build.build import Options, build
from dalle_dist.data.decode import decode_sample
from dalle_dist.data.shards import ShardSet
from dalle_dist.errors import DataError


def _fill(folder, image, count=20):
    for i in range(count):
        name, format_ = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))[i % 3]
        storage.write_bytes(
            storage.join(str(folder), f"{i:02d}.{name}"), image(size=(40, 20), format_=format_)
        )
        storage.write_bytes(storage.join(str(folder), f"{i:02d}.txt"), f"image {i}\n".encode())
    return str(folder)


def _samples(out):
    found = {}
    for part in ("train", "held-out"):
        shards = ShardSet(storage.join(str(out), part), "images")
        found[part] = {s["__key__"].decode(): s for s in map(shards.read, range(len(shards)))}
    return found


def test_every_picture_lands_in_one_part_with_its_caption(tmp_path, image, capsys):
    build(
        _fill(tmp_path / "in", image),
        str(tmp_path / "out"),
        Options(size=None, seed=0, held_out=0.3),
    )
    found = _samples(tmp_path / "out")
    assert found["train"].keys() | found["held-out"].keys() == {f"{i:02d}" for i in range(20)}
    assert not found["train"].keys() & found["held-out"].keys()
    for key, sample in (found["train"] | found["held-out"]).items():
        assert sample["txt"].decode() == f"image {int(key)}"
        assert decode_sample(sample).size == (40, 20)
    assert f"{len(found['train'])} images to train on" in capsys.readouterr().out


def test_the_split_depends_on_seed_and_name_alone(tmp_path, image):
    folder = _fill(tmp_path / "in", image)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        if out == "b":
            (tmp_path / "in" / "00.png").unlink()
        build(folder, str(tmp_path / out), Options(size=None, seed=seed, held_out=0.3))
    a, b, c = (set(_samples(tmp_path / out)["held-out"]) - {"00"} for out in "abc")
    assert a == b != c


def test_small_folders_hold_out_one(tmp_path, image):
    build(
        _fill(tmp_path / "in", image, 3),
        str(tmp_path / "out"),
        Options(size=None, seed=0, held_out=0.001),
    )
    found = _samples(tmp_path / "out")
    assert (len(found["train"]), len(found["held-out"])) == (2, 1)


def test_pictures_are_shrunk_on_their_shorter_side_and_never_enlarged(tmp_path, image):
    folder = _fill(tmp_path / "in", image, 4)
    storage.write_bytes(storage.join(folder, "small.png"), image(size=(6, 9)))
    storage.write_bytes(storage.join(folder, "small.txt"), b"small")
    build(folder, str(tmp_path / "out"), Options(size=10, seed=0, held_out=0.3))
    found = _samples(tmp_path / "out")
    sizes = {k: decode_sample(s).size for k, s in (found["train"] | found["held-out"]).items()}
    assert sizes == {
        "00": (20, 10),
        "01": (20, 10),
        "02": (20, 10),
        "03": (20, 10),
        "small": (6, 9),
    }


def test_what_cannot_be_used_is_named_counted_and_skipped(tmp_path, image, capsys):
    folder = _fill(tmp_path / "in", image)
    (tmp_path / "in" / "03.png").write_bytes(b"not an image")
    (tmp_path / "in" / "04.txt").write_text(" \n")
    (tmp_path / "in" / "05.txt").unlink()
    build(folder, str(tmp_path / "out"), Options(held_out=0.3))
    found = _samples(tmp_path / "out")
    assert len(found["train"]) + len(found["held-out"]) == 17
    printed = capsys.readouterr().out
    for line in (
        "skipped 03.png: not a picture",
        "skipped 04.jpg: no caption",
        "skipped 05.webp: no caption",
        "1  skipped: not a picture, e.g. 03.png",
        "2  skipped: no caption, e.g. 04.jpg",
    ):
        assert line in printed
    skipped = storage.read_bytes(str(tmp_path / "out/skipped.jsonl")).decode().splitlines()
    assert {"file": "03.png", "reason": "not a picture"} in map(json.loads, skipped)
    assert len(skipped) == 3


def test_nothing_usable_is_fatal_and_leaves_nothing(tmp_path, image):
    folder = _fill(tmp_path / "in", image, 5)
    for path in (tmp_path / "in").iterdir():
        if path.suffix != ".txt":
            path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"0 images can be used.*5 skipped: not a picture"):
        build(folder, str(tmp_path / "out"), Options(size=None, seed=0, held_out=0.3))
    (tmp_path / "in" / "00.png").write_bytes(image())
    with pytest.raises(DataError, match="1 images can be used"):
        build(folder, str(tmp_path / "out"), Options(size=None, seed=0, held_out=0.3))
    assert storage.list_files(str(tmp_path / "out")) == []


@pytest.mark.parametrize(
    ("held_out", "size", "message"),
    [(0.0, None, "held-out 0.0"), (1.0, None, "held-out 1.0"), (0.3, 0, "--size 0")],
)
def test_senseless_options_are_refused(tmp_path, image, held_out, size, message):
    with pytest.raises(DataError, match=message):
        build(
            _fill(tmp_path / "in", image),
            str(tmp_path / "out"),
            Options(size=size, seed=0, held_out=held_out),
        )


def test_missing_and_empty_folders_and_used_outputs_are_refused(tmp_path, image):
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "no images"), ("absent", "no such folder")):
        with pytest.raises(DataError, match=message):
            build(
                str(tmp_path / folder),
                str(tmp_path / "out"),
                Options(size=None, seed=0, held_out=0.3),
            )
    folder = _fill(tmp_path / "in", image)
    build(folder, str(tmp_path / "out"), Options(size=None, seed=0, held_out=0.3))
    with pytest.raises(DataError, match="in use"):
        build(folder, str(tmp_path / "out"), Options(size=None, seed=0, held_out=0.3))


def test_sub_folders_are_part_of_the_key(tmp_path, image):
    folder = _fill(tmp_path / "in" / "a.b", image, 3)
    build(str(tmp_path / "in"), str(tmp_path / "out"), Options(size=None, seed=0, held_out=0.3))
    found = _samples(tmp_path / "out")
    assert folder.endswith("a.b")
    assert found["train"].keys() | found["held-out"].keys() == {"a_b__00", "a_b__01", "a_b__02"}


def test_turned_photographs_stand_upright(tmp_path, image):
    folder = _fill(tmp_path / "in", image, 3)
    photograph, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    buffer = io.BytesIO()
    photograph.save(buffer, format="JPEG", exif=exif)
    storage.write_bytes(storage.join(folder, "01.jpg"), buffer.getvalue())
    build(folder, str(tmp_path / "out"), Options(size=None, seed=0, held_out=0.3))
    found = _samples(tmp_path / "out")
    assert decode_sample((found["train"] | found["held-out"])["01"]).size == (20, 30)


def test_from_bucket_to_bucket(bucket, image):
    folder = _fill(storage.join(bucket, "in"), image, 6)
    build(folder, storage.join(bucket, "out"), Options(size=None, seed=0, held_out=0.3))
    found = _samples(storage.join(bucket, "out"))
    assert found["train"].keys() | found["held-out"].keys() == {f"{i:02d}" for i in range(6)}


def test_the_shards_may_lie_beside_what_they_are_made_of(tmp_path, image):
    folder = _fill(tmp_path / "in", image)
    build(folder, folder, Options(size=None, seed=0, held_out=0.3))
    found = _samples(tmp_path / "in")
    assert len(found["train"]) + len(found["held-out"]) == 20
