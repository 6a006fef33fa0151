"""Tables of captions, and of paths or images."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from made import build, captions, fill, skipped

from dalle_dist import storage
from dalle_dist.data.shards import INDEX

ROWS = [(f"n{i}.png", f'a "quoted, {i}" caption') for i in range(6)]


def table_of(kind, path):
    """A table of `ROWS`; its path."""
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in ROWS]
        path.write_text("\n".join([*lines, "", "no JSON"]))
    elif kind == "parquet":
        names, texts = zip(*ROWS, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"TEXT": texts, "path": names}), path)
    elif kind == "csv":
        quoted = [text.replace('"', '""') for _, text in ROWS]
        rows = [f'{name};"{text}"' for (name, _), text in zip(ROWS, quoted, strict=True)]
        path.write_text("\ufeff" + "\n".join(["Image;Caption", *rows]) + "\n", "utf-8")
    else:
        rows = [f"{text}\t{name}" if kind == "turned" else f"{name}\t{text}" for name, text in ROWS]
        head = ["image\tcaption"] if kind == "headed" else []
        path.write_text("\n".join([*head, *rows, ""]))
    return path


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("jsonl", "jsonl"),
        ("parquet", "parquet"),
        ("csv", "csv"),
        ("headed", "tsv"),
        ("bare", "tsv"),
        ("turned", "tsv"),
    ],
)
def test_paths_are_relative_to_the_table(tmp_path, image, kind, end):
    root = fill(tmp_path / "in", image)
    table = table_of(kind, root / f"table.{end}")
    assert build(table, tmp_path / "out") == 0
    wanted = {name.removesuffix(".png"): text for name, text in ROWS}
    assert captions(tmp_path / "out") == wanted
    bad = {"table.jsonl row 7": "no image in this row"} if kind == "jsonl" else {}
    assert skipped(tmp_path / "out") == bad


def test_a_folder_takes_captions_from_a_table(tmp_path, image):
    root = fill(tmp_path / "in", image)
    (root / "sub").mkdir()
    (root / "n0.png").rename(root / "sub" / "n0.png")
    table = table_of("headed", tmp_path / "told.tsv")
    assert build(root, tmp_path / "out", "--captions-from", table) == 0
    assert captions(tmp_path / "out")["sub__n0"] == ROWS[0][1]
    # The caption of n0.png is no longer that of any picture.
    reasons = sorted(skipped(tmp_path / "out").values())
    assert reasons == ["a caption file, not asked for"] * 5 + ["caption without an image"]


def test_rows_of_one_picture_are_held_out_together(tmp_path, image):
    root = fill(tmp_path / "in", image)
    rows = [f"n{i}.png\tcaption {i} {k}" for i in range(6) for k in range(5)]
    (root / "t.tsv").write_text("\n".join(["path\ttitle", *rows]))
    assert build(root / "t.tsv", tmp_path / "out", "--held-out", "0.5") == 0
    train, held_out = (
        {text.split()[1] for text in captions(tmp_path / "out", part).values()}
        for part in ("train", "held-out")
    )
    assert len(captions(tmp_path / "out")) == 30 and not train & held_out


def test_columns_may_be_named_and_must_be_there(tmp_path, image, capsys):
    root = fill(tmp_path / "in", image)
    table = root / "t.csv"
    table.write_text("\n".join(["a,b,caption", *(f"n{i}.png,named {i},no" for i in range(6))]))
    assert build(table, tmp_path / "out") == 2
    assert "no column of images among a, b, caption; name one with --image-column" in (
        capsys.readouterr().err
    )
    assert build(table, tmp_path / "out", "--image-column", "a", "--caption-column", "x") == 2
    named = ("--image-column", "a", "--caption-column", "b")
    assert build(table, tmp_path / "out", *named) == 0
    assert captions(tmp_path / "out")["n1"] == "named 1"


def test_what_a_row_lacks_costs_that_row(tmp_path, image):
    root = fill(tmp_path / "in", image)
    rows = [f"n{i}.png\tcaption {i}".encode() for i in range(4)]
    rows += [b"gone.png\tgone", b"n4.png\t", b"\tno image", b"n5.png\tun caf\xe9"]
    rows += [b"http://example.com/a.png\tfar away", b"n5.png"]
    (root / "t.tsv").write_bytes(b"\n".join([b"image\tcaption", *rows]))
    assert build(root / "t.tsv", tmp_path / "out") == 0
    told = skipped(tmp_path / "out")
    assert told["gone.png"] == "cannot be read: No such file or directory"
    assert told["t.tsv row 7"] == "no image in this row" and told["n4.png"] == "no caption"
    assert "img2dataset" in told["http://example.com/a.png"]
    assert len(captions(tmp_path / "out")) == 4
    assert build(root / "t.tsv", tmp_path / "right", "--encoding", "latin-1") == 0
    assert "un café" in captions(tmp_path / "right").values()


def test_a_table_of_addresses_alone_is_refused(tmp_path, capsys):
    (tmp_path / "laion.tsv").write_text("url\tcaption\nhttp://example.com/1.jpg\tone\n")
    assert build(tmp_path / "laion.tsv", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "img2dataset" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole_folder", [False, True])
def test_images_inside_parquet(tmp_path, image, whole_folder):
    (tmp_path / "in").mkdir()
    colours = ["red", "lime", "blue", "white", "black", "gray", "navy", "pink"]
    cells = [{"bytes": image(colour), "path": None} for colour in colours]
    cells[3] = {"bytes": None, "path": "x"}
    table = pyarrow.table({"image": cells, "caption": [[c, "second"] for c in colours]})
    path = tmp_path / "in" / "train-00000.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    source = tmp_path / "in" if whole_folder else path
    assert build(source, tmp_path / "out", "--samples-per-shard", "2") == 0
    found = captions(tmp_path / "out")
    assert {key[-1]: text for key, text in found.items()} == {
        str(i): colour for i, colour in enumerate(colours) if i != 3
    }
    assert skipped(tmp_path / "out") == {
        "train-00000.parquet row 4": "cannot be read: no image in this row"
    }


def test_tables_and_pictures_of_a_bucket(bucket, image):
    for i in range(4):
        storage.write_bytes(f"{bucket}/in/p{i}.png", image())
    rows = [*(f"p{i}.png\tnear {i}" for i in range(3)), f"{bucket}/in/p3.png\tfull"]
    text = "\n".join(["image\tcaption", *rows, "gone.png\tgone"])
    storage.write_bytes(f"{bucket}/in/t.tsv", text.encode())
    assert build(f"{bucket}/in/t.tsv", f"{bucket}/out") == 0
    assert sorted(captions(f"{bucket}/out").values()) == ["full", "near 0", "near 1", "near 2"]
    names = storage.list_files(f"{bucket}/out")
    wanted = {f"{part}/{name}" for part in ("train", "held-out") for name in ("00000.tar", INDEX)}
    assert {"skipped.jsonl", *wanted} <= set(names)
    assert not [name for name in names if "unfinished" in name]
    line = json.loads(storage.read_bytes(f"{bucket}/out/skipped.jsonl"))
    assert line == {"file": "gone.png", "reason": "cannot be read: no such object"}


@pytest.mark.parametrize("data", [b"", b"PAR1", b"\xff\xfe\0"])
@pytest.mark.parametrize("end", ["csv", "parquet", "jsonl", "tsv"])
def test_damaged_tables_are_one_line(tmp_path, capsys, data, end):
    (tmp_path / f"t.{end}").write_bytes(data)
    assert build(tmp_path / f"t.{end}", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"t.{end}" in line
