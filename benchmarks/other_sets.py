"""Sets of small images with captions, to see how a preset fares on others than the demo's.

Stage 1 of preset `emoji` was looked at on the first two while it was chosen, on the others never.

glyphs       characters of DejaVu Sans, which comes with matplotlib, in a colour on a background:
             "greek small letter alpha in red on yellow"
icons        of the themes in THEMES: name, category and theme, "mail send, actions, oxygen"
other-icons  of the themes in OTHER_THEMES, likewise
emojione     EmojiOne's drawings of the emoji of 2016: "see-no-evil monkey"

All but glyphs are in packages of Debian, which apt-get fetches, unpacked here without root.

    python -m benchmarks.other_sets glyphs data/glyphs-folder
    dalle-dist data build data/glyphs-folder data/glyphs --size 64

A folder holds NAME.png and NAME.txt. No two images of it are the same, pixel by pixel.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from dalle_dist.data.decode import on_white
from dalle_dist.data.emoji import fully_qualified

SIZE = 64  # pixels
LETTERS = 44  # pixels: size of a glyph's font
SEED = 0
COLOURS = ("black", "white", "red", "orange", "yellow", "green", "blue", "purple", "pink", "gray")
MOST_GLYPHS = 5_000
# Package and folder of each theme; all draw their own icons, many under the same names.
THEMES = {
    "oxygen": ("oxygen-icon-theme", "oxygen/base"),
    "faenza": ("faenza-icon-theme", "Faenza"),
    "mate": ("mate-icon-theme", "mate"),
}
OTHER_THEMES = {
    "gnome": ("gnome-icon-theme", "gnome"),
    "lxde": ("lxde-icon-theme", "nuoveXT2"),
    "elementary": ("elementary-xfce-icon-theme", "elementary-xfce"),
}
EMOJIONE = "ruby-gemojione"
JOINERS = "\u200d\ufe0f"  # EmojiOne's file names leave these characters of a sequence out
LEAST_ICON = 48  # pixels: smaller ones are other, simpler drawings
SIDE = re.compile(r"(\d+)(x\d+)?")  # the folder of one size: 48x48, or 48
Pair = tuple[str, Image.Image]  # caption and image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=SETS)
    parser.add_argument("out", type=Path, help="folder to make; must not be there yet")
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out}: is there already; delete it or choose another")
    count = write_folder(SETS[options.set](), options.out)
    print(f"{options.out}: {count} images with captions")


def write_folder(pairs: Iterator[Pair], out: Path) -> int:
    """Write NAME.png and NAME.txt of each image that no other equals; returns how many."""
    seen: set[bytes] = set()
    for caption, image in pairs:
        pixels = image.tobytes()
        if pixels not in seen:
            out.mkdir(parents=True, exist_ok=True)
            name = f"{len(seen):05}"
            image.save(out / f"{name}.png")
            (out / f"{name}.txt").write_text(f"{caption}\n", encoding="utf-8")
            seen.add(pixels)
    return len(seen)


def glyphs() -> Iterator[Pair]:
    """Up to MOST_GLYPHS characters that have a name, in an order that depends on the seed alone."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(str(path), LETTERS)
    characters = [chr(code) for code in sorted(FT2Font(str(path)).get_charmap())]
    random.Random(SEED).shuffle(characters)
    drawn = (pair for character in characters if (pair := glyph(character, font)))
    yield from (pair for pair, _ in zip(drawn, range(MOST_GLYPHS), strict=False))


def glyph(character: str, font: ImageFont.FreeTypeFont) -> Pair | None:
    """The character in the middle of the image; None if it is blank, too wide or without a name.

    Letters, numbers, punctuation and symbols alone: marks are drawn on a dotted circle.
    """
    name = unicodedata.name(character, "").lower()
    left, top, right, bottom = font.getbbox(character)
    if not name or unicodedata.category(character)[0] not in "LNPS":
        return None
    if not 0 < max(right - left, bottom - top) <= SIZE:
        return None
    ink, background = random.Random(f"{SEED} {name}").sample(COLOURS, 2)
    image = Image.new("RGB", (SIZE, SIZE), background)
    at = (SIZE - left - right) / 2, (SIZE - top - bottom) / 2
    ImageDraw.Draw(image).text(at, character, fill=ink, font=font)
    return f"{name} in {ink} on {background}", image


def icons(themes: Mapping[str, tuple[str, str]]) -> Iterator[Pair]:
    """Of every theme the largest drawing of each icon, on white."""
    for theme, (package, folder) in themes.items():
        with tempfile.TemporaryDirectory() as place:
            unpack(package, Path(place))
            yield from theme_icons(Path(place, "usr/share/icons", folder), theme)


def theme_icons(folder: Path, theme: str) -> Iterator[Pair]:
    """Those of one theme, by category and name; square ones of LEAST_ICON pixels and more."""
    largest: dict[tuple[str, str], Image.Image] = {}
    for path in sorted(folder.rglob("*.png")):
        image = None if path.is_symlink() else icon(path)  # a link is a second name of an icon
        category = next((name for name in path.parts[-2:-4:-1] if not SIDE.fullmatch(name)), "")
        key = category, re.sub(r"[-_.\s]+", " ", path.stem)
        if image is not None and (key not in largest or image.width > largest[key].width):
            largest[key] = image
    for (category, name), image in sorted(largest.items(), key=lambda item: item[0]):
        yield f"{name}, {category}, {theme}", small(image)


def icon(path: Path) -> Image.Image | None:
    """None if it is too small, not square, blank or no image."""
    try:
        image = Image.open(path).convert("RGBA")
    except (OSError, UnidentifiedImageError):
        return None
    usable = image.width == image.height >= LEAST_ICON and image.getchannel("A").getbbox()
    return image if usable else None


def small(image: Image.Image) -> Image.Image:
    return on_white(image).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def emojione() -> Iterator[Pair]:
    """Those whose code points, after which the files are named, have a CLDR name."""
    without_joiners = str.maketrans("", "", JOINERS)
    names = {emoji.text.translate(without_joiners): emoji.name for emoji in fully_qualified()}
    with tempfile.TemporaryDirectory() as place:
        unpack(EMOJIONE, Path(place))
        for path in sorted(Path(place).rglob("assets/png/*.png")):
            text = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
            name, image = names.get(text.translate(without_joiners)), icon(path)
            if name and image:
                yield name, small(image)


def unpack(package: str, folder: Path) -> None:
    """Fetch a Debian package and unpack it into the folder; root is not needed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SystemExit(f"{package}: needs apt-get and dpkg-deb, which Debian and Ubuntu have")
    subprocess.run(["apt-get", "-q", "download", package], cwd=folder, check=False)
    found = next(folder.glob("*.deb"), None)
    if found is None:
        raise SystemExit(f"{package}: could not be fetched; try apt-get update first")
    subprocess.run(["dpkg-deb", "-x", found, folder], check=True)


SETS: dict[str, Callable[[], Iterator[Pair]]] = {
    "glyphs": glyphs,
    "icons": lambda: icons(THEMES),
    "other-icons": lambda: icons(OTHER_THEMES),
    "emojione": emojione,
}


if __name__ == "__main__":
    main()
