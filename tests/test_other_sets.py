"""The other sets of benchmarks/other_sets.py: captions say what is in the images, none is twice."""

import sys
from pathlib import Path

import pytest
from PIL import Image, ImageColor, ImageDraw

from benchmarks import other_sets
from dalle_dist.data.build.build import Options, build
from dalle_dist.data.shards import ShardSet

SIZE = other_sets.SIZE


def made(monkeypatch, name, out):
    monkeypatch.setattr(sys, "argv", ["other_sets", name, str(out)])
    other_sets.main()
    captions = [path.read_text().strip() for path in sorted(out.glob("*.txt"))]
    images = [Image.open(path) for path in sorted(out.glob("*.png"))]
    return captions, images


def test_glyphs_are_what_their_captions_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(other_sets, "MOST_GLYPHS", 60)
    captions, images = made(monkeypatch, "glyphs", tmp_path / "glyphs")
    assert len(captions) == len(images) == len(set(captions)) >= 55
    assert capsys.readouterr().out == f"{tmp_path}/glyphs: {len(images)} images with captions\n"
    for caption, image in zip(captions, images, strict=True):
        ink, background = caption.split(" in ")[-1].split(" on ")
        counts = {pixel: count for count, pixel in image.getcolors(SIZE**2)}
        assert image.size == (SIZE, SIZE) and ink != background
        assert counts[ImageColor.getrgb(background)] > SIZE
        # What is thin is nowhere of the ink's full strength.
        assert ImageColor.getrgb(ink) in counts or len(counts) > 2, caption
    again, _ = made(monkeypatch, "glyphs", tmp_path / "again")
    assert again == captions
    build(str(tmp_path / "glyphs"), str(tmp_path / "shards"), Options(size=SIZE, held_out=0.1))
    held_out = ShardSet(str(tmp_path / "shards/held-out"), "images")
    assert held_out.read(0)["txt"].decode() in captions


def draw(path, colour, size, box=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", size)
    if colour:
        ImageDraw.Draw(image).rectangle(box or (0, 0, *size), fill=colour)
    image.save(path)


def test_icons_are_the_largest_of_each_name_and_none_is_twice(tmp_path, monkeypatch):
    def unpack(package, place):
        assert package == "some-package"
        theme = place / "usr/share/icons/Some"
        draw(theme / "actions/48/mail-send.png", "blue", (48, 48))
        draw(theme / "128x128/actions/mail-send.png", "red", (128, 128), (0, 0, 64, 128))
        draw(theme / "48x48/apps/mail-send.png", "yellow", (48, 48))
        draw(theme / "96x96/apps/mail-send.png", "green", (96, 96))
        draw(theme / "32x32/apps/small.png", "black", (32, 32))
        draw(theme / "48x48/apps/wide.png", "black", (96, 48))
        draw(theme / "48x48/apps/blank.png", None, (48, 48))
        draw(theme / "64x64/status/the_same.png", "green", (64, 64))
        (theme / "48x48/apps/damaged.png").write_bytes(b"no image")
        (theme / "48x48/apps/link.png").symlink_to("mail-send.png")

    monkeypatch.setattr(other_sets, "unpack", unpack)
    monkeypatch.setattr(other_sets, "THEMES", {"some": ("some-package", "Some")})
    captions, images = made(monkeypatch, "icons", tmp_path / "icons")
    assert captions == ["mail send, actions, some", "mail send, apps, some"]
    assert [image.getpixel((10, 30)) for image in images] == [(255, 0, 0), (0, 128, 0)]
    assert images[0].getpixel((60, 30)) == (255, 255, 255)
    with pytest.raises(SystemExit, match="icons: is there already"):
        other_sets.main()


def test_emojione_has_the_names_of_its_code_points(tmp_path, monkeypatch):
    def unpack(package, place):
        assert package == "ruby-gemojione"
        folder = place / "usr/share/gems/some-1.0/assets/png"
        draw(folder / "1F648.png", "red", (64, 64), (0, 0, 31, 64))
        draw(folder / "1F469-1F680.png", "green", (64, 64))  # the sequence has a joiner between
        draw(folder / "2764.png", "blue", (64, 64))  # and this one ends in a variation selector
        draw(folder / "0041.png", "black", (64, 64))  # the letter A
        draw(folder.parent / "other/1F600.png", "black", (64, 64))

    monkeypatch.setattr(other_sets, "unpack", unpack)
    captions, images = made(monkeypatch, "emojione", tmp_path / "emojione")
    assert dict(zip(captions, (image.getpixel((10, 30)) for image in images), strict=True)) == {
        "see-no-evil monkey": (255, 0, 0),
        "woman astronaut": (0, 128, 0),
        "red heart": (0, 0, 255),
    }
    assert images[captions.index("see-no-evil monkey")].getpixel((60, 30)) == (255, 255, 255)


def test_without_debian_the_icons_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match="some-package: needs apt-get"):
        other_sets.unpack("some-package", Path(tmp_path))
