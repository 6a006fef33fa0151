"""Pairs: the emoji above, its styled copy below, all styles of an emoji in one part."""

import json

import numpy as np
import pytest
from PIL import Image

from dalle_dist.cli import main
from dalle_dist.data import emoji as room
from dalle_dist.data.decode import decode
from dalle_dist.data.emoji import fully_qualified
from dalle_dist.data.emoji_pairs import STYLES, pairs
from dalle_dist.data.shards import ShardSet


def square():
    """A red left half with a green spot above, on white."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (0, 0, 32, 64))
    image.paste("lime", (40, 4, 56, 20))
    return image


def halves(image):
    pixels = np.asarray(image).astype(int)
    assert (pixels[:, :8] == 255).all() and (pixels[:, 24:] == 255).all()
    return pixels[:16, 8:24], pixels[16:, 8:24]


def test_the_upper_half_is_the_emoji_and_the_lower_its_copy():
    made = {style: (image, caption) for style, image, caption in pairs(square(), "thing", 32)}
    assert list(made) == list(STYLES)
    small = np.asarray(square().resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    lower = {}
    for style, (image, caption) in made.items():
        assert caption == f"the exact same thing on the top as a {style} thing on the bottom"
        upper, lower[style] = halves(image)
        assert (upper == small).all()
    assert (lower["grey"] == lower["grey"][..., :1]).all()
    assert np.abs(lower["flipped"] - small[::-1]).max() <= 4
    assert lower["blue"][8, 2, 2] > lower["blue"][8, 2, 0] + 60
    assert (lower["outlined"][8, 2] > 240).all() and lower["outlined"][8, 6:10].min() < 200


def test_the_command_keeps_all_styles_of_an_emoji_in_one_part(tmp_path, monkeypatch, capsys):
    # The font is the machine's, not the test's: its download goes to the user's own cache.
    monkeypatch.delenv("DALLE_DIST_CACHE")
    some = list(fully_qualified())[::40]
    monkeypatch.setattr(room, "fully_qualified", lambda: iter(some))
    monkeypatch.setattr(room, "choose_held_out", lambda drawn, share, seed: set(drawn[:3]))
    assert main(["data", "emoji", str(tmp_path / "out"), "--size", "32", "--pairs"]) == 0
    assert "3 held out; 4 images of each" in capsys.readouterr().out
    found = {}
    for part in ("train", "held-out"):
        shards = ShardSet(str(tmp_path / "out" / part), "images")
        samples = [shards.read(i) for i in range(len(shards))]
        found[part] = [json.loads(sample["json"])["emoji"] for sample in samples]
        assert decode(samples[0]["png"]).size == (32, 32)
        assert samples[0]["txt"].decode().startswith("the exact same ")
    assert len(found["held-out"]) == 12 and not set(found["held-out"]) & set(found["train"])
    assert len(set(found["train"])) * 4 == len(found["train"])


def test_without_pairs_an_emoji_is_one_image(tmp_path, monkeypatch):
    monkeypatch.delenv("DALLE_DIST_CACHE")
    some = list(fully_qualified())[::80]
    monkeypatch.setattr(room, "fully_qualified", lambda: iter(some))
    monkeypatch.setattr(room, "choose_held_out", lambda drawn, share, seed: set(drawn[:3]))
    room.build_emoji(str(tmp_path), 16, 0, 0.05)
    assert len(ShardSet(str(tmp_path / "held-out"), "images")) == 3
    with pytest.raises(room.DataError, match="in use"):
        room.build_emoji(str(tmp_path), 16, 0, 0.05, paired=True)
