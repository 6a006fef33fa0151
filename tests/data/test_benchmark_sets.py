"""MS-COCO and CUB as their users unpack them."""

import json
import pickle

import pytest

from dalle_dist.cli import main
from dalle_dist.data.shards import ShardSet


def captions(folder):
    shards = ShardSet(str(folder), "images")
    found = [shards.read(i) for i in range(len(shards))]
    return {s["__key__"].decode(): s["txt"].decode() for s in found}


@pytest.fixture
def coco(tmp_path, image):
    root = tmp_path / "coco"
    for split, count in (("train", 6), ("val", 9)):
        (root / f"{split}2014").mkdir(parents=True)
        tree = {"images": [], "annotations": []}
        for i in range(count):
            name = f"COCO_{split}2014_{i:012d}.jpg"
            (root / f"{split}2014" / name).write_bytes(image(size=(20, 12), format_="JPEG"))
            tree["images"].append({"id": 100 + i, "file_name": name})
            for k in range(3):
                one = {"id": 3 * i + k, "image_id": 100 + i, "caption": f" {split} {i}\nno {k} "}
                tree["annotations"].append(one)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"captions_{split}2014.json").write_text(json.dumps(tree))
    return root


def test_coco_has_one_caption_per_image_and_as_many_held_out_as_asked(coco, tmp_path, capsys):
    command = ["data", "coco", str(coco)]
    assert main([*command, str(tmp_path / "a"), "--held-out-captions", "5"]) == 0
    assert "6 images to train on, 5 held out" in capsys.readouterr().out
    train, held_out = (captions(tmp_path / "a" / part) for part in ("train", "held-out"))
    assert len(train) == 6 and len(held_out) == 5
    for key, caption in (train | held_out).items():
        split, number = key.split("_")[1].removesuffix("2014"), int(key.split("_")[2])
        assert caption in {f"{split} {number} no {k}" for k in range(3)}
    assert len({caption[-1] for caption in (train | held_out).values()}) > 1
    (coco / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    assert main([*command, str(tmp_path / "b"), "--size", "8"]) == 0
    assert len(captions(tmp_path / "b" / "held-out")) == 8
    assert captions(tmp_path / "b" / "train") == train
    assert main([*command, str(tmp_path / "c"), "--held-out-captions", "5", "--seed", "1"]) == 0
    assert captions(tmp_path / "c" / "held-out") != held_out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "annotations/captions_val2014.json").unlink(),
            "YEAR.json is missing",
        ),
        (
            lambda root: (root / "annotations/captions_val2017.json").write_text("{}"),
            "annotations/captions_valYEAR.json is there for several years",
        ),
        (
            lambda root: (root / "annotations/captions_val2014.json").write_text("[]"),
            "captions_val2014.json holds no captions of images",
        ),
        (lambda root: (root / "train2014").rename(root / "x"), "train2014/ is missing"),
    ],
)
def test_what_coco_lacks_is_one_line(coco, tmp_path, capsys, spoil, message):
    spoil(coco)
    assert main(["data", "coco", str(coco), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()


@pytest.fixture
def cub(tmp_path, image):
    root = tmp_path / "birds"
    for number, name in ((1, "Albatross"), (2, "Auklet"), (13, "Bobolink")):
        folder = f"{number:03d}.{name}"
        for i in range(2):
            picture = root / "CUB_200_2011" / "images" / folder / f"{name}_{i}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(image(size=(20, 12), format_="JPEG"))
            text = root / "text_c10" / folder / f"{name}_{i}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"{name} {i} is  red\n\na bird\n{name} {i} is small\n")
    (root / "test").mkdir()
    names = ["013.Bobolink/Bobolink_0", "013.Bobolink/Bobolink_1"]
    (root / "test" / "filenames.pickle").write_bytes(pickle.dumps(names, protocol=0))
    return root


def test_cub_holds_out_every_unique_caption_of_the_test_classes(cub, tmp_path):
    assert main(["data", "cub", str(cub), str(tmp_path / "out")]) == 0
    assert captions(tmp_path / "out" / "train") == {
        f"{name}_{i}": f"{name} {i} is red" for name in ("Albatross", "Auklet") for i in range(2)
    }
    assert captions(tmp_path / "out" / "held-out") == {
        "Bobolink_0-0": "Bobolink 0 is red",
        "Bobolink_0-1": "a bird",
        "Bobolink_0-2": "Bobolink 0 is small",
        "Bobolink_1-0": "Bobolink 1 is red",
        "Bobolink_1-2": "Bobolink 1 is small",
    }


@pytest.mark.parametrize("listed", ["002.Auklet", "2", "002.Auklet/Auklet_0.jpg\n"])
def test_cubs_test_classes_may_be_named(cub, tmp_path, listed):
    (tmp_path / "classes.txt").write_text(listed)
    command = ["data", "cub", str(cub), str(tmp_path / "out")]
    assert main([*command, "--test-classes", str(tmp_path / "classes.txt")]) == 0
    assert {key[:6] for key in captions(tmp_path / "out" / "held-out")} == {"Auklet"}


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "text_c10").rename(root / "x"), "text_c10/ is missing"),
        (lambda root: (root / "CUB_200_2011").rename(root / "x"), "CUB_200_2011/images/ is"),
        (lambda root: (root / "test/filenames.pickle").unlink(), "name a file with --test-classes"),
        (
            lambda root: (root / "test/filenames.pickle").write_bytes(pickle.dumps(Evil())),
            "not a pickled list of file names (asks for builtins.print)",
        ),
        (
            lambda root: (root / "test/filenames.pickle").write_bytes(pickle.dumps([1])),
            "not a pickled list of file names",
        ),
    ],
)
def test_what_cub_lacks_is_one_line(cub, tmp_path, capsys, spoil, message):
    spoil(cub)
    assert main(["data", "cub", str(cub), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line and "run" not in captured.out and not (tmp_path / "out").exists()
