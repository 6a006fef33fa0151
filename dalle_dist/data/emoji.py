"""The demo's data: every emoji of the Noto Color Emoji font, captioned with its CLDR name."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from dalle_dist import storage
from dalle_dist.data.decode import on_white
from dalle_dist.data.emoji_pairs import STYLES, pairs
from dalle_dist.data.shards import ShardWriter, refuse_used
from dalle_dist.errors import DataError

FONT = "NotoColorEmoji.ttf"
PACKAGE = "fonts-noto-color-emoji"
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
STRIKE = 109  # the one size of the font's bitmaps, which are 136 pixels wide
CELL, ORIGIN = 136, (0, 4)  # a square cell, and where its text starts to stand in its middle
PARTS = ("train", "held-out")


@dataclass(frozen=True)
class Emoji:
    text: str
    name: str

    @property
    def words(self) -> frozenset[str]:
        return frozenset(self.name.lower().split())


def build_emoji(out: str, size: int, seed: int, held_out: float, paired: bool = False) -> None:
    """Write OUT/train and OUT/held-out: one `size` x `size` image per emoji, on white.

    Args:
        paired: one image for each style instead, with the emoji above and its styled copy below
            (`emoji_pairs.py`); all those of an emoji are in the same part.

    Raises:
        DataError: no font to be had, or OUT holds shards already.
    """
    if not 0 < held_out < 0.5 or size < 1:
        raise DataError(f"--held-out {held_out} is not in (0, 0.5), or --size {size} below 1")
    refuse_used(*(storage.join(out, part) for part in PARTS))
    font = _load_font(find_font())
    known = list(fully_qualified())
    # Pairs are made smaller afterwards.
    side = CELL if paired else size
    images = {emoji: image for emoji in known if (image := render(font, emoji, side))}
    drawn = list(images)
    chosen = choose_held_out(drawn, held_out, seed)
    for part in PARTS:
        with ShardWriter(storage.join(out, part), "images", {"source": FONT, "size": size}) as w:
            for i, (emoji, image) in enumerate(images.items()):
                if (emoji in chosen) == (part == "held-out"):
                    for key, files in _samples(f"{i:06d}", emoji, image, size, paired):
                        w.write(key, files)
    print(
        f"{out}: {len(drawn)} of {len(known)} fully-qualified emoji are in the font; "
        f"{len(drawn) - len(chosen)} to train on, {len(chosen)} held out"
        + (f"; {len(STYLES)} images of each" if paired else "")
    )


def fully_qualified() -> Iterator[Emoji]:
    """All emoji of the Unicode list that the `emoji` package carries, with readable names."""
    import emoji

    for text, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"]:
            yield Emoji(text, data["en"].strip(":").replace("_", " "))


def choose_held_out(emoji: list[Emoji], share: float, seed: int) -> set[Emoji]:
    """Those whose names are new combinations of words that the rest still teaches.

    Each name has three words or more, each word stands in two other names or more at the time it
    is chosen, and no remaining name has the same set of words.
    """
    left = Counter(word for one in emoji for word in one.words)
    same = Counter(one.words for one in emoji)
    candidates = [one for one in emoji if len(one.words) >= 3 and same[one.words] == 1]
    random.Random(seed).shuffle(candidates)
    chosen: set[Emoji] = set()
    for one in candidates:
        if len(chosen) >= round(share * len(emoji)):
            break
        if all(left[word] >= 3 for word in one.words):
            chosen.add(one)
            left.subtract(one.words)
    return chosen


def find_font() -> Path:
    """The font where it is installed, else from Debian's package, unpacked without root.

    Raises DataError with one line on how to get it.
    """
    places = [Path(folder).expanduser() for folder in FOLDERS]
    for folder in [*places, storage.cache_folder() / "fonts"]:
        found = next(folder.rglob(FONT), None) if folder.is_dir() else None
        if found is not None:
            return found
    unpacked = _unpack_package(storage.cache_folder() / "fonts")
    if unpacked is None:
        raise DataError(
            f"no {FONT} on this machine; install it with: apt-get install {PACKAGE} "
            f"(or put the file into {places[-1]})"
        )
    return unpacked


def render(font: ImageFont.FreeTypeFont, emoji: Emoji, size: int) -> Image.Image | None:
    """The emoji on white, size x size; None when the font lacks it.

    A sequence that the font joins is one glyph wide, any other falls apart; and an emoji newer
    than the font is one glyph wide but blank.
    """
    if abs(font.getlength(emoji.text) - font.getlength("\N{GRINNING FACE}")) >= 1:
        return None
    glyph = Image.new("RGBA", (CELL, CELL), (255, 255, 255, 0))
    ImageDraw.Draw(glyph).text(ORIGIN, emoji.text, font=font, embedded_color=True)
    if glyph.getbbox() is None:
        return None
    return on_white(glyph).resize((size, size), Image.Resampling.LANCZOS)


def _unpack_package(target: Path) -> Path | None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    commands = [["apt-get", "-q", "download", PACKAGE]]
    if os.geteuid() == 0:
        # A fresh container has no package lists, and only root may fetch them.
        commands += [["apt-get", "-q", "update"], commands[0]]
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            subprocess.run(command, cwd=folder, capture_output=True, check=False)
            package = next(Path(folder).glob("*.deb"), None)
            if package is not None:
                subprocess.run(["dpkg-deb", "-x", package, folder], check=False)
                unpacked = next(Path(folder).rglob(FONT), None)
                if unpacked is not None:
                    storage.write_bytes(str(target / FONT), unpacked.read_bytes())
                    return target / FONT
    return None


def _load_font(path: Path) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise DataError("this Pillow lacks Raqm, which joins emoji sequences; pip install pillow")
    return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)


def _samples(
    key: str, emoji: Emoji, image: Image.Image, size: int, paired: bool
) -> Iterator[tuple[str, dict[str, bytes]]]:
    if not paired:
        yield key, _files(emoji, image, emoji.name)
        return
    for style, pair, caption in pairs(image, emoji.name, size):
        yield f"{key}-{style}", _files(emoji, pair, caption)


def _files(emoji: Emoji, image: Image.Image, caption: str) -> dict[str, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    width, height = image.size
    about = {
        "emoji": emoji.text,
        "codepoints": [f"U+{ord(character):04X}" for character in emoji.text],
        "name": emoji.name,
        "width": width,
        "height": height,
    }
    return {
        "png": buffer.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps(about).encode(),
    }
