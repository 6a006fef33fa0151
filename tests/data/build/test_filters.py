"""What is left out on request is counted by its reason."""

import sys

import pytest
from made import build, captions, fill, skipped

from dalle_dist.data.build import filters
from dalle_dist.data.build.filters import Filters

LINES = {
    "short": "a cat",
    "date": "photographed on 3 May 2012",
    "name": "IMG_20120503.jpg",
    "german": "ein roter Ball auf der grünen Wiese",
    "good": "a red ball on the green meadow",
    "taken": "a red ball on the green meadow, taken in 2012",
}


@pytest.fixture
def folder(tmp_path, image):
    root = fill(tmp_path / "in", image, 0)
    for name, line in LINES.items():
        (root / f"{name}.png").write_bytes(image())
        (root / f"{name}.txt").write_text(line)
    for name, size in (("wide", (33, 16)), ("double", (32, 16)), ("small", (7, 8))):
        (root / f"{name}.png").write_bytes(image(size=size))
        (root / f"{name}.txt").write_text("a blue ball on the yellow beach")
    return root


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (["--min-words", "3"], {"short": "less than 3 words", "name": "less than 3 words"}),
        (["--drop-boilerplate"], {"date": "boilerplate", "name": "boilerplate"}),
        (["--language", "en"], {"german": "language en"}),
        (["--max-aspect", "2"], {"wide": "aspect ratio beyond 2"}),
        (["--min-side", "8"], {"small": "below 8 pixels"}),
        (
            ["--paper-filters"],
            {
                "short": "words",
                "date": "boilerplate",
                "name": "words",
                "german": "language",
                "wide": "aspect",
            },
        ),
    ],
)
def test_each_filter_leaves_out_its_own(folder, tmp_path, options, left_out):
    assert build(folder, tmp_path / "out", *options) == 0
    told = skipped(tmp_path / "out")
    assert told.keys() == {f"{name}.png" for name in left_out}
    assert all(reason in told[f"{name}.png"] for name, reason in left_out.items())


def test_of_several_captions_those_that_pass_are_kept(folder, tmp_path):
    (folder / "good.txt").write_text("a cat\na red ball on the meadow\nno")
    assert build(folder, tmp_path / "out", "--min-words", "3", "--caption", "random") == 0
    assert captions(tmp_path / "out")["good"] == "a red ball on the meadow"


@pytest.mark.parametrize(
    "line",
    [
        "photo taken on 2012-05-03",
        "Image may contain: dog",
        "all rights reserved 2019",
        "click to enlarge",
        "DSC01234",
        "Photographed on July 4th, 1998",
        "stock photo",
    ],
)
def test_boilerplate(line):
    assert Filters(drop_boilerplate=True).lines(line)[0] == ""


@pytest.mark.parametrize(
    "line",
    ["a photo of a dog", "an image of two men", "the pier in May", "photo 51 of DNA by X-rays"],
)
def test_what_is_told_of_a_picture_is_no_boilerplate(line):
    assert Filters(drop_boilerplate=True).lines(line)[0] == line


def test_the_paper_filters_need_a_package(folder, tmp_path, monkeypatch, capsys):
    filters._languages.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    assert build(folder, tmp_path / "out", "--paper-filters") == 2
    assert "pip install" in capsys.readouterr().err
    filters._languages.cache_clear()


@pytest.mark.parametrize(
    "options", [["--language", "klingon"], ["--max-aspect", "0.5"], ["--min-side", "-1"]]
)
def test_senseless_filters_are_refused(folder, tmp_path, options, capsys):
    assert build(folder, tmp_path / "out", *options) == 2
    assert options[0] in capsys.readouterr().err and not (tmp_path / "out").exists()
