"""The verb with a CLIP: what it writes and prints, its page, and what it refuses."""

import base64
import io
import re
import shutil
from pathlib import Path

import pytest
from copied import COPIES, CORRUPT_EVALUATED, EVALUATED
from PIL import Image

from dalle_dist.cli import main
from dalle_dist.data.shards import ShardSet
from dalle_dist.overlap.page import SPREAD, TOP, chosen
from dalle_dist.overlap.pairs import CELL, ShownPair, drawn

ROOT = Path(__file__).parents[2]
READABLE = EVALUATED - len(CORRUPT_EVALUATED)


def images_of(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_the_verb_finds_copies_by_a_clip(sets, clip, tmp_path, capsys):
    command = ["overlap", *sets, "--clip", clip, "-o", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "evaluated: 140 images, of which 1 cannot be decoded, left out" in said
    assert "150 images, of which 3 cannot be decoded, left out" in said
    assert not (tmp_path / "keep.txt").exists()
    lines = (tmp_path / "overlap.csv").read_text().splitlines()
    nearest = {line.split(",")[0]: line.split(",")[3].strip('"') for line in lines[1:]}
    assert len(nearest) == READABLE
    for copy, (origin, _) in COPIES.items():
        assert nearest[f"e{copy:04d}"] == f"t{origin:04d}"


def threshold_of(out, row):
    """The similarity of a row of the table, which that row and those before it reach."""
    rows = (out / "overlap.csv").read_text().splitlines()[1:]
    similarities = [line.rpartition(",")[2] for line in rows]
    assert float(similarities[row]) > float(similarities[row + 1])
    return similarities[row]


def test_a_threshold_is_told_and_shown(sets, clip, tmp_path, capsys):
    command = ["overlap", *sets, "--clip", clip, "-o", str(tmp_path), "--chunk", "64"]
    assert main(command) == 0
    threshold = threshold_of(tmp_path, 40)
    assert main([*command, "--threshold", threshold]) == 0
    told = f"threshold {float(threshold):g}: 41 of {READABLE} images (29.5%) overlap"
    assert told in capsys.readouterr().out
    assert len((tmp_path / "keep.txt").read_text().split()) == READABLE - 41
    page = (tmp_path / "report.html").read_text()
    assert f"<td>{float(threshold):g} (--threshold)</td><td>41 of {READABLE} images" in page
    assert f"Around the threshold {float(threshold):g}, which 41 images reach" in page
    for part in ("1 to 60", "61 to 120", f"121 to {READABLE}"):
        assert f"Pairs {part} of {READABLE}: " in page
    histogram, around, *pairs = images_of(page)
    assert len(pairs) == 3 and all(image.height > CELL for image in (histogram, around, *pairs))
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_the_page_shows_the_most_similar_and_some_of_all_others():
    assert chosen(7) == list(range(7))
    assert chosen(TOP + SPREAD) == list(range(TOP + SPREAD))
    many = chosen(5000)
    assert many[:TOP] == list(range(TOP)) and len(many) == TOP + SPREAD == len({*many})
    steps = {b - a for a, b in zip(many[TOP:], many[TOP + 1 :], strict=False)}
    assert many == sorted(many) and steps == {40, 41} and many[-1] < 5000


def test_images_of_a_pair_stand_side_by_side_in_their_shape():
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 10), "blue")
    canvas = drawn([ShownPair(0.5, (red, blue), ("a red one", "a blue one"))])
    colours = {colour: count for count, colour in canvas.getcolors(1 << 20)}
    assert colours[(255, 0, 0)] == CELL * CELL // 2 and colours[(0, 0, 255)] == CELL * CELL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "1.5"], "--threshold: 1.5 is no cosine; from -1 to 1"),
        (["--threshold", "nan"], "--threshold: nan is no cosine"),
        (["--chunk", "100"], "--chunk: 100 is not a multiple of 64"),
        (["--chunk", "0"], "--chunk: 0 is not a multiple of 64"),
        (["--clip", "none"], "none: no CLIP"),
        ([], "none: no shards here"),
    ],
)
def test_what_does_not_fit_is_one_line(
    sets, clip, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    training = sets[1] if arguments else "none"
    assert main(["overlap", sets[0], training, "--clip", clip, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "overlap").exists()


def test_the_page_in_docs_says_how_to_leave_out_what_overlaps(sets, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sets[0], "data/mine/held-out")
    command = ["overlap", "data/mine/held-out", sets[1], "--clip", clip]
    assert main(command) == 0
    assert main([*command, "--threshold", threshold_of(Path("overlap"), 40)]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/overlap.md").read_text(), re.DOTALL)
    exec(code)
    apart = ShardSet("data/mine/held-out-apart", "images")
    keys = [apart.read(i)["__key__"].decode() for i in range(len(apart))]
    assert keys == Path("overlap/keep.txt").read_text().split()
    assert len(keys) == READABLE - 41
