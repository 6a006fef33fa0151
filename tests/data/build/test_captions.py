"""Captions are right, or named with what helps; never replaced in silence."""

import codecs
import json

import pytest
from made import build, captions, fill, skipped

from dalle_dist.data.build.captions import of_name
from dalle_dist.data.shards import ShardIndex

TEXTS = {
    "utf8": ("un café", "un café".encode()),
    "utf8-bom": ("un café", codecs.BOM_UTF8 + "un café".encode()),
    "utf16": ("un café", "un café".encode("utf-16")),
    "utf16-be": ("un café", codecs.BOM_UTF16_BE + "un café".encode("utf-16-be")),
    "utf32": ("赤い猫", "赤い猫".encode("utf-32")),
    "utf32-be": ("赤い猫", codecs.BOM_UTF32_BE + "赤い猫".encode("utf-32-be")),
}
OTHERS = {
    "gbk": ("红色的心", "红色的心".encode("gbk")),
    "cp1252": ("it\u2019s a café", "it\u2019s a café".encode("cp1252")),
    "shift-jis": ("赤い猫", "赤い猫".encode("shift-jis")),
    "utf-16-le": ("赤い猫 a", "赤い猫 a".encode("utf-16-le")),
}


@pytest.fixture
def texts(tmp_path, image):
    root = fill(tmp_path / "in", image, 3)
    for name, (_, data) in (TEXTS | OTHERS).items():
        (root / f"{name}.png").write_bytes(image())
        (root / f"{name}.txt").write_bytes(data)
    (root / "nul.png").write_bytes(image())
    (root / "nul.txt").write_bytes(b"a\0b")
    return root


def test_marked_texts_are_right_and_others_named(texts, tmp_path, capsys):
    assert build(texts, tmp_path / "out") == 0
    found = captions(tmp_path / "out")
    assert {name: found.get(name) for name in TEXTS} == {n: text for n, (text, _) in TEXTS.items()}
    told = skipped(tmp_path / "out")
    assert told.keys() == {f"{name}.png" for name in (*OTHERS, "nul")}
    assert all("--encoding NAME" in reason for reason in told.values())
    assert "skipped gbk.png: the caption is not UTF-8; name its" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", OTHERS)
def test_a_named_encoding_is_decoded_strictly(texts, tmp_path, encoding):
    assert build(texts, tmp_path / "out", "--encoding", encoding) == 0
    found = captions(tmp_path / "out")
    assert found[encoding] == OTHERS[encoding][0]
    assert {name: found[name] for name in TEXTS if name != "utf8"} == {
        name: text for name, (text, _) in TEXTS.items() if name != "utf8"
    }
    assert not any("\ufffd" in text for text in found.values())


def test_what_is_no_encoding_is_refused(texts, tmp_path, capsys):
    for name in ("klingon", "hex"):
        assert build(texts, tmp_path / "out", "--encoding", name) == 2
        assert f"--encoding {name}: not an encoding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "wanted"), [("first-line", "one"), ("all", "one two"), ("random", "one\ntwo")]
)
def test_of_several_lines_those_that_are_asked_for(tmp_path, image, choice, wanted):
    root = fill(tmp_path / "in", image, 3)
    (root / "n1.txt").write_text("\n one \r\n\n two\n")
    (root / "n2.txt").unlink()
    (root / "n2.json").write_text(json.dumps({"caption": [" one", "two"]}))
    assert build(root, tmp_path / "out", "--caption", choice) == 0
    found = captions(tmp_path / "out")
    assert found["n1"] == found["n2"] == wanted
    meta = ShardIndex.load(str(tmp_path / "out/train")).meta
    assert meta.get("captions") == ("random-line" if choice == "random" else None)


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"caption": 3}', '{"caption": "\\ud800"}'])
def test_json_without_a_caption_is_counted(tmp_path, image, text):
    root = fill(tmp_path / "in", image)
    (root / "x.png").write_bytes(image())
    (root / "x.json").write_text(text)
    assert build(root, tmp_path / "out") == 0
    assert skipped(tmp_path / "out").keys() == {"x.png"}


@pytest.mark.parametrize(("told", "wanted"), [("folder", "sea shells"), ("file", "red panda")])
def test_names_may_be_captions(tmp_path, image, told, wanted):
    (tmp_path / "in" / "sea_shells-2").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "in" / "sea_shells-2" / f"red-panda_{i:03d}.png").write_bytes(image())
    assert build(tmp_path / "in", tmp_path / "out", "--captions-from", told) == 0
    assert list(captions(tmp_path / "out").values()) == [wanted] * 3


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("red-panda_012", "red panda"), ("cat (3)", "cat"), ("0001", ""), ("boeing747", "boeing747")],
)
def test_numbers_behind_a_name_are_no_caption(name, wanted):
    assert of_name(name) == wanted
