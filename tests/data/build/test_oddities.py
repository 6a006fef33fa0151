"""A folder with all that people's folders hold: each file is used, or counted by its reason."""

import os
import re
import socket
from pathlib import Path

import pytest
from made import build, captions, fill, samples, skipped


@pytest.fixture
def odd(tmp_path, image):
    """A folder with every kind of oddity."""
    root = fill(tmp_path / "in", image)
    for name, format_ in (
        ("a.gif", "GIF"),
        ("b.BMP", "BMP"),
        ("c.tif", "TIFF"),
        ("d.jfif", "JPEG"),
    ):
        (root / name).write_bytes(image(format_=format_))
        (root / name).with_suffix(".TXT" if name == "b.BMP" else ".txt").write_text("of a format")
    fill(tmp_path / "elsewhere", image, 2)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    (root / "broken.png").symlink_to(tmp_path / "nowhere")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "album.png").mkdir()
    (root / "album.png" / "inside.png").write_bytes(image())
    (root / "album.png" / "inside.txt").write_text("inside an album")
    (root / "album.txt").write_text("notes on the album")
    (root / "a.b.png").write_bytes(image())
    (root / "a.b.txt").write_text("dot")
    (root / "a_b.png").write_bytes(image())
    (root / "a_b.txt").write_text("line")
    (root / "saved").write_bytes(image())
    (root / "saved.txt").write_text("without an extension")
    (root / "whole.png.txt").write_text("named after the whole name")
    (root / "whole.png").write_bytes(image())
    (root / "told.png").write_bytes(image())
    (root / "told.json").write_text('{"caption": "in JSON"}')
    (root / "n0.json").write_text('{"caption": "another"}')
    (root / ".DS_Store").write_bytes(b"\0")
    (root / "Thumbs.db").write_bytes(b"\0")
    (root / ".cache").mkdir()
    (root / ".cache" / "hidden.png").write_bytes(image())
    (root / "README.md").write_text("not a picture")
    (root / "metadata.csv").write_text("file_name,text\n")
    (root / "old.tar").write_bytes(b"")
    (root / "empty.png").write_bytes(b"")
    (root / "empty.txt").write_text("an empty file")
    (root / "mute.png").write_bytes(image())
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(root / "socket.png"))
    server.close()
    name = os.fsencode(root) + b"/caf\xe9"
    for end, data in ((b".png", image()), (b".txt", b"in Latin-1")):
        Path(os.fsdecode(name + end)).write_bytes(data)
    return root


def entries(root):
    """How many files and links there are, those that lead to a folder that is taken not."""
    found = 0
    for folder, folders, names in os.walk(root):
        found += len(names) + sum(Path(folder, name).is_symlink() for name in folders)
    return found


def test_every_file_is_used_or_counted(odd, tmp_path, capsys):
    assert build(odd, tmp_path / "out") == 0
    text = capsys.readouterr().out
    used, told = captions(tmp_path / "out"), skipped(tmp_path / "out")
    in_captions = int(re.search(r"(\d+)  caption files", text)[1])
    # One of the two links was followed to four files; it is none itself.
    assert len(used) + in_captions + len(told) == entries(odd) + 4 - 1
    assert told == {
        "linked": "a link to a folder that is taken already",
        "circle": "a link to a folder that is taken already",
        "broken.png": "a broken link",
        "self.png": "a broken link",
        "album.txt": "caption without an image",
        "n0.json": "another caption of an image that has one",
        ".DS_Store": "hidden, or a system's own file",
        "Thumbs.db": "hidden, or a system's own file",
        ".cache/hidden.png": "hidden, or a system's own file",
        "README.md": "not a picture",
        "metadata.csv": "a table: name it as the source, or by --captions-from",
        "old.tar": "a tar: build it by itself",
        "empty.png": "damaged: the file is empty",
        "mute.png": "no caption",
        "socket.png": "not a file",
    }
    assert "followed the link again" in text
    assert "3  of format" not in text and "1  of format GIF" in text
    assert "3  skipped: hidden, or a system's own file, e.g. " in text


def test_each_picture_has_its_own_caption_and_key(odd, tmp_path):
    assert build(odd, tmp_path / "out") == 0
    used = captions(tmp_path / "out")
    assert {used[f"n{i}"] for i in range(6)} == {f"caption {i}" for i in range(6)}
    assert used["a_b"] == "dot"
    (other,) = [key for key in used if re.fullmatch("a_b-[0-9a-f]{8}", key)]
    assert used[other] == "line"
    assert used["caf_xe9"] == "in Latin-1"
    assert used["album_png__inside"] == "inside an album"
    assert used["again__n1"] == "caption 1"
    assert used["saved"] == "without an extension" and used["told"] == "in JSON"
    assert used["whole"] == "named after the whole name" and used["b"] == "of a format"


def test_what_is_no_usual_file_lies_in_the_shard_as_png(odd, tmp_path):
    assert build(odd, tmp_path / "out") == 0
    found = samples(tmp_path / "out")
    assert {"png"} == {e for key in "abc" for e in found[key]} - {"txt", "json", "__key__"}
    assert found["d"]["jpg"] == (odd / "d.jfif").read_bytes()


def test_an_output_inside_the_source_is_no_part_of_it(tmp_path, image, capsys):
    root = fill(tmp_path / "in", image)
    assert build(root, root / "out") == 0
    (root / "out/train/index.json").unlink()
    (root / "out/held-out/index.json").unlink()
    assert build(root, root / "out") == 0
    assert len(captions(root / "out")) == 6 and not skipped(root / "out")


def test_unreadable_files_cost_themselves(tmp_path, image):
    root = fill(tmp_path / "in", image)
    (root / "gone.png").symlink_to("/proc/self/mem")  # a file that cannot be read, even by root
    (root / "gone.txt").write_text("gone")
    assert build(root, tmp_path / "out") == 0
    (reason,) = skipped(tmp_path / "out").values()
    assert reason.startswith("cannot be read: ") and len(captions(tmp_path / "out")) == 6
