import json

import pytest

from dalle_dist.data import emoji as room
from dalle_dist.data.decode import decode
from dalle_dist.data.emoji import Emoji, build_emoji, choose_held_out, find_font, fully_qualified
from dalle_dist.data.shards import ShardSet
from dalle_dist.errors import DataError


def _captions(folder):
    shards = ShardSet(str(folder), "images")
    return [shards.read(i)["txt"].decode() for i in range(len(shards))]


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_captions_are_new_combinations_of_known_words(seed):
    emoji = list(fully_qualified())
    chosen = choose_held_out(emoji, 0.05, seed)
    train = [one for one in emoji if one not in chosen]
    known = {word for one in train for word in one.name.lower().split()}
    captions = {one.name.lower() for one in train}
    combinations = {frozenset(caption.split()) for caption in captions}
    assert len(chosen) == round(0.05 * len(emoji))
    for one in chosen:
        words = one.name.lower().split()
        assert set(words) <= known, one.name
        assert one.name.lower() not in captions
        assert frozenset(words) not in combinations
        assert len(set(words)) >= 3
    assert chosen == choose_held_out(emoji, 0.05, seed)
    assert chosen != choose_held_out(emoji, 0.05, seed + 10)


def test_names_are_cldrs_with_spaces():
    names = {one.text: one.name for one in fully_qualified()}
    assert len(names) > 3900
    assert names["\u2764\ufe0f"] == "red heart"
    assert names["\U0001f469\U0001f3fc\u200d\u2695\ufe0f"] == (
        "woman health worker medium-light skin tone"
    )


@pytest.fixture(scope="module")
def some():
    """A tenth of the set, with the faces of families that the font joins and cannot join."""
    return list(fully_qualified())[::10]


def test_build_writes_pictures_on_white_with_their_names(tmp_path, monkeypatch, capsys, some):
    # The font is the machine's, not the test's: its download goes to the user's own cache.
    monkeypatch.delenv("DALLE_DIST_CACHE")
    monkeypatch.setattr(room, "fully_qualified", lambda: iter(some))
    out = tmp_path / "out"
    build_emoji(str(out), 24, 0, 0.05)
    train, held_out = _captions(out / "train"), _captions(out / "held-out")
    count = len(train) + len(held_out)
    assert f"{count} of {len(some)} fully-qualified emoji are in the font" in (
        capsys.readouterr().out
    )
    assert 0.9 * len(some) < count < len(some)  # the newest emoji are blank in the font
    assert len(held_out) == round(0.05 * count)
    names = {one.name for one in some}
    assert {*train, *held_out} <= names
    shards = ShardSet(str(out / "train"), "images")
    samples = [shards.read(i) for i in range(len(shards))]
    for sample in samples:
        about = json.loads(sample["json"])
        assert (about["width"], about["height"]) == (24, 24)
        assert "".join(chr(int(c[2:], 16)) for c in about["codepoints"]) == about["emoji"]
        assert Emoji(about["emoji"], sample["txt"].decode()) in some
    images = [decode(sample["png"]) for sample in samples]
    assert {image.size for image in images} == {(24, 24)}
    assert all(image.getpixel((0, 0)) == (255, 255, 255) for image in images)
    assert all(min(low for low, _ in image.getextrema()) < 250 for image in images)


def test_sequences_are_joined_or_left_out(monkeypatch):
    monkeypatch.delenv("DALLE_DIST_CACHE")
    font = room._load_font(find_font())
    joined = Emoji("\U0001f469\U0001f3fd\u200d\U0001f680", "woman astronaut medium skin tone")
    apart = Emoji("\U0001f600\u200d\U0001f600", "no such sequence")
    assert room.render(font, joined, 32) is not None
    assert room.render(font, apart, 32) is None


def test_an_emoji_newer_than_the_font_is_left_out(monkeypatch):
    """Its place is taken by a glyph as wide as any, but blank: here that of no character at all."""
    monkeypatch.delenv("DALLE_DIST_CACHE")
    font = room._load_font(find_font())
    unassigned = Emoji("\u0378", "not yet in Unicode")
    assert font.getlength(unassigned.text) == font.getlength("\N{GRINNING FACE}")
    assert room.render(font, unassigned, 32) is None


def test_an_output_in_use_is_refused_before_the_font_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "index.json").write_text("{}")
    monkeypatch.setattr(room, "find_font", lambda: pytest.fail("looked for the font"))
    with pytest.raises(DataError, match="held-out: in use"):
        build_emoji(str(tmp_path), 24, 0, 0.05)
    assert not (tmp_path / "train").exists()


def test_without_a_font_there_is_one_line_on_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "FOLDERS", (str(tmp_path / "fonts"),))
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji") as error:
        find_font()
    assert "\n" not in str(error.value)


def test_the_package_is_unpacked_without_being_installed(monkeypatch, tmp_path):
    """Stand-ins for apt-get and dpkg-deb: the second lays the font where the package has it."""

    class Tools:
        ran = ()

        @classmethod
        def run(cls, command, **_):
            cls.ran += (command[0],)
            if command[0] == "dpkg-deb":
                place = room.Path(command[3]) / "usr/share/fonts/truetype/noto"
                place.mkdir(parents=True)
                (place / room.FONT).write_bytes(b"font")
            elif "download" in command:
                (room.Path(_["cwd"]) / "fonts-noto-color-emoji.deb").write_bytes(b"package")

    monkeypatch.setattr(room, "FOLDERS", (str(tmp_path / "fonts"),))
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room.shutil, "which", lambda name: name)
    monkeypatch.setattr(room, "subprocess", Tools)
    for _ in range(2):  # the second time it lies in the cache
        assert find_font().read_bytes() == b"font"
    assert Tools.ran == ("apt-get", "dpkg-deb")
