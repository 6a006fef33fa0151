"""The verb with a CLIP: what it writes and prints, its page, and what it refuses."""

import base64
import io
import re

import pytest
from copied import COPIES, CORRUPT_EVALUATED, EVALUATED
from PIL import Image

from dalle_dist.cli import main
from dalle_dist.overlap.page import SPREAD, TOP, chosen
from dalle_dist.overlap.pairs import CELL, ShownPair, drawn

READABLE = EVALUATED - len(CORRUPT_EVALUATED)


def images_of(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_the_verb_finds_copies_by_a_clip(sets, clip, tmp_path, capsys):
    command = ["overlap", *sets, "--clip", clip, "-o", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "evaluated: 140 images, of which 1 cannot be decoded and are left out" in said
    assert "150 images, of which 3 cannot be decoded and are left out" in said
    assert not (tmp_path / "keep.txt").exists()
    lines = (tmp_path / "overlap.csv").read_text().splitlines()
    nearest = {line.split(",")[0]: line.split(",")[3].strip('"') for line in lines[1:]}
    assert len(nearest) == READABLE
    for copy, (origin, _) in COPIES.items():
        assert nearest[f"e{copy:04d}"] == f"t{origin:04d}"


def test_a_threshold_is_told_and_shown(sets, clip, tmp_path, capsys):
    command = ["overlap", *sets, "--clip", clip, "-o", str(tmp_path), "--chunk", "64"]
    assert main([*command, "--threshold", "0.5"]) == 0
    kept = (tmp_path / "keep.txt").read_text().split()
    count = READABLE - len(kept)
    assert f"threshold 0.5: {count} of {READABLE} images ({count / READABLE:.1%}) overlap" in (
        capsys.readouterr().out
    )
    page = (tmp_path / "report.html").read_text()
    assert f"<td>0.5 (--threshold)</td><td>{count} of {READABLE} images" in page
    assert f"Around the threshold 0.5, which {count} images reach" in page
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
