import pytest
from PIL import Image

from dalle_dist.data.inspect import inspect
from dalle_dist.data.shards import ShardWriter
from dalle_dist.errors import DataError


def _write(folder, image):
    with ShardWriter(str(folder), "images", {}, samples_per_shard=4) as writer:
        for i in range(6):
            data = b"not an image" if i == 5 else image(size=(8 + i // 4, 8))
            writer.write(f"{i}", {"png": data, "txt": b"" if i == 0 else b"two words"})


def test_counts_sizes_and_captions_are_printed_for_both_parts(tmp_path, image, capsys):
    for part in ("train", "held-out"):
        _write(tmp_path / part, image)
    inspect(str(tmp_path), None)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    size = sum(p.stat().st_size for p in (tmp_path / "train").glob("*.tar"))
    assert lines[: len(lines) // 2] == [
        f"{tmp_path}/train: 6 images in 2 shards, {size} bytes",
        "caption characters min 0, median 9, max 9",
        "caption words min 0, median 2, max 2",
        "empty captions 1",
        "8x8 4 images",
        "9x8 1 images",
        "cannot be decoded 1 images",
    ]
    assert lines[len(lines) // 2].startswith(f"{tmp_path}/held-out: 6 images")


def test_the_contact_sheet_shows_what_can_be_decoded(tmp_path, image, capsys):
    _write(tmp_path / "s", image)
    inspect(str(tmp_path / "s"), tmp_path / "new" / "sheet.png")
    assert "contact sheet of 5 images" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        colours = {colour: n for n, colour in sheet.getcolors()}
    assert colours[(255, 0, 0)] == 5 * 96 * 96
    assert colours[(0, 0, 0)] > 50  # captions


def test_damage_is_noticed(tmp_path, image):
    _write(tmp_path / "s", image)
    path = tmp_path / "s" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[520] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"00001\.tar: sha256 differs"):
        inspect(str(tmp_path / "s"), None)


def test_no_shards_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no shards here"):
        inspect(str(tmp_path), None)
