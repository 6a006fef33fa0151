"""The commands of docs/data.md are tried in their order, on made-up files of the same layout."""

import io
import json
import pickle
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from packed import pack
from readme_commands import ROOT, commands

from dalle_dist import storage
from dalle_dist.cli import build_parser, main
from dalle_dist.config import load
from dalle_dist.data.shards import ShardWriter

PAGE = (ROOT / "docs/data.md").read_text()
# How a command is tried: run in this process, or in a shell, or only parsed (what needs a GPU, a
# cluster or another program's downloads; img2dataset's folder is made up).
HOW = [
    (r"dalle-dist data (build|inspect|verify|coco|cub|index) .*", "run"),
    (r"dalle-dist tokenizer train .*", "run"),
    (r"sed -i .*", "shell"),
    (r"export .*", "shell"),
    (r"(srun --ntasks 8 --gpus-per-task 1 )?dalle-dist encode .*", "parsed"),
    (r"dalle-dist train-dvae .*", "parsed"),
    (r"img2dataset .*", "img2dataset"),
    (r"[a-z_]+\.[a-z_]+=\S+", "override"),
]


def made_folder(root, image, count=30):
    for i in range(count):
        (root / f"photos/{i % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"photos/{i % 3}/{i}.png").write_bytes(image(size=(9, 8)))
        (root / f"photos/{i % 3}/{i}.txt").write_text(f"a plain picture {i}")
    rows = [f"photos/{i % 3}/{i}.png,a plain picture {i}" for i in range(count)]
    (root / "pairs.csv").write_text("\n".join(["file,title", *rows]))


def made_img2dataset(root, image, tars=3, each=6):
    (root / "cc3m.tsv").write_text("a picture\thttp://localhost/a.jpg\n")
    for t in range(tars):
        files = []
        for i in range(each):
            key, told = f"{t:05d}{i:04d}", f"a plain picture of a thing, number {t} {i}"
            about = {"caption": told, "key": key, "status": "success", "width": 9, "height": 8}
            contents = (image(size=(9, 8), format_="JPEG"), json.dumps(about), told)
            for end, data in zip(("jpg", "json", "txt"), contents, strict=True):
                files.append((f"{key}.{end}", data.encode() if isinstance(data, str) else data))
        pack(root / f"cc3m/{t:05d}.tar", files)
        (root / f"cc3m/{t:05d}_stats.json").write_text("{}")
        (root / f"cc3m/{t:05d}.parquet").write_bytes(b"")


def made_coco(root, image):
    for split in ("train", "val"):
        (root / f"coco/{split}2014").mkdir(parents=True)
        (root / "coco/annotations").mkdir(exist_ok=True)
        (root / f"coco/{split}2014/a.jpg").write_bytes(image(format_="JPEG"))
        one = {"id": 1, "image_id": 7, "caption": "a plain picture"}
        tree = {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [one]}
        (root / f"coco/annotations/captions_{split}2014.json").write_text(json.dumps(tree))


def made_cub(root, image):
    for name in ("001.Auk", "002.Crow"):
        (root / f"cub/CUB_200_2011/images/{name}").mkdir(parents=True)
        (root / f"cub/text_c10/{name}").mkdir(parents=True)
        (root / f"cub/CUB_200_2011/images/{name}/a.jpg").write_bytes(image(format_="JPEG"))
        (root / f"cub/text_c10/{name}/a.txt").write_text("a bird\n")
    (root / "cub/test").mkdir()
    (root / "cub/test/filenames.pickle").write_bytes(pickle.dumps(["002.Crow/a"]))


def made_tokens(root):
    """As `encode` leaves them: any token set will do."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1024, np.uint16))
    for part in ("train", "held-out"):
        with ShardWriter(str(root / "data/cc3m-tokens" / part), "tokens", {}) as writer:
            writer.write("a", {"npy": buffer.getvalue(), "txt": b"told"})


@pytest.fixture
def place(tmp_path, image, monkeypatch, bucket):
    """A working folder with all that the page's reader has, also in a bucket."""
    made_folder(tmp_path, image)
    made_img2dataset(tmp_path, image)
    made_coco(tmp_path, image)
    made_cub(tmp_path, image)
    made_tokens(tmp_path)
    for path in (tmp_path / "cc3m").iterdir():
        storage.write_bytes(storage.join(bucket, "cc3m", path.name), path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return bucket


def how(command):
    found = [way for pattern, way in HOW if re.fullmatch(pattern, command)]
    assert len(found) == 1, f"docs/data.md has a command nobody tries: {command}"
    return found[0]


def test_every_row_tries_a_command_and_every_command_has_a_row():
    found = commands(PAGE)
    assert len(found) > 15
    ways = {command: how(command) for command in found}
    used = [any(re.fullmatch(pattern, command) for command in ways) for pattern, _ in HOW]
    assert all(used)


def assert_works(command, bucket):
    way, line = how(command), command.replace("s3://bucket", bucket)
    words = shlex.split(line)
    if way == "run":
        assert main(words[1:]) == 0, command
    elif way == "shell":
        subprocess.run(["bash", "-euc", line], check=True)
    elif way == "parsed":
        options = build_parser().parse_args(words[words.index("dalle-dist") + 1 :])
        assert load(options.preset, options.overrides).name == options.preset
    elif way == "override":
        assert load("cc3m", [line]) != load("cc3m")
    else:
        given = dict(zip(words[1::2], words[2::2], strict=True))
        assert Path(given["--output_folder"]).is_dir()  # what it would make
        head = Path(given["--url_list"]).read_text().splitlines()[0].split("\t")
        assert head == [given["--caption_col"], given["--url_col"]]


def test_the_commands_of_the_page_work_in_their_order(place, tmp_path):
    for command in commands(PAGE):
        assert_works(command, place)
    for name in ("mine", "table", "cc3m", "cc3m-filtered", "coco", "cub"):
        assert (tmp_path / f"data/{name}/train/index.json").is_file()
    assert (tmp_path / "data/cc3m/tokenizer.json").is_file()
    assert not list((tmp_path / "data/cc3m").rglob("*.tar"))
    assert storage.exists(storage.join(place, "set/train/index.json"))
