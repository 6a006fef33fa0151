import io
import shutil

import numpy as np
import pytest
from PIL import Image

from dalle_dist import storage
from dalle_dist.cli import main
from dalle_dist.data import inspect as module
from dalle_dist.data.inspect import TextBlock, inspect
from dalle_dist.data.shards import ShardWriter
from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.bpe import train_tokenizer


def _write(folder, image, count=6, per_shard=4, meta=None, caption=b"two words"):
    with ShardWriter(str(folder), "images", meta or {}, per_shard) as writer:
        for i in range(count):
            data = b"not an image" if i == 5 else image(size=(8 + i // 4, 8))
            about = b"{}" if i == 5 else b'{"width": %d, "height": 8}' % (8 + i // 4)
            told = b"" if i == 0 else caption
            writer.write(f"{i}", {"png": data, "txt": told, "json": about})


def _lines(capsys):
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_counts_sizes_and_captions_are_printed_for_both_parts(tmp_path, image, capsys):
    for part in ("train", "held-out"):
        _write(tmp_path / part, image)
    size = sum(p.stat().st_size for p in (tmp_path / "train").glob("*.tar"))
    for tar in tmp_path.rglob("*.tar"):
        tar.unlink()  # nothing is read from them
    inspect(str(tmp_path), None)
    lines = _lines(capsys)
    assert lines[: len(lines) // 2] == [
        f"{tmp_path}/train: 6 images in 2 shards, {size} bytes",
        "captions 6",
        "caption characters min 0, median 9, max 9",
        "caption words min 0, median 2, max 2",
        "empty captions 1 (16.7%)",
        "repeated captions 4 (66.7%)",
        "shorter side min 8, median 8, max 8 pixels",
        "8x8 4 images",
        "9x8 1 images",
        "of unknown size 1 images",
    ]
    assert lines[len(lines) // 2].startswith(f"{tmp_path}/held-out: 6 images")


def test_of_many_shards_some_are_looked_at_and_it_is_said(tmp_path, image, capsys, monkeypatch):
    monkeypatch.setattr(module, "SHARDS", 3)
    _write(tmp_path, image, 24, 2)
    for shard in set(range(12)) - {0, 4, 8}:
        (tmp_path / f"{shard:05d}.samples.parquet").unlink()
    inspect(str(tmp_path), None)
    lines = _lines(capsys)
    assert lines[0].startswith(f"{tmp_path}: 24 images in 12 shards")
    assert lines[1:3] == ["looked at 6 of them, in 3 shards, evenly spread", "captions 6"]


def test_how_many_captions_a_text_block_would_cut(tmp_path, image, capsys):
    _write(tmp_path / "s", image)
    train_tokenizer(["two words"], 258).save(str(tmp_path / "t.json"))  # a token for each byte
    options = ["--tokenizer", str(tmp_path / "t.json"), "--text-tokens"]
    assert main(["data", "inspect", str(tmp_path / "s"), *options, "9"]) == 0
    lines = _lines(capsys)
    assert {"caption tokens min 0, median 10, max 10", "cut to 9 tokens 5 (83.3%)"} < set(lines)
    assert main(["data", "inspect", str(tmp_path / "s"), *options, "10"]) == 0
    assert "cut to 10 tokens 0 (0.0%)" in _lines(capsys)
    for tokenizer, tokens in ((None, 9), ("t.json", None), ("t.json", 0)):
        with pytest.raises(DataError, match="--text-tokens N and --tokenizer FILE go together"):
            TextBlock.of(tokenizer, tokens)


def test_all_lines_of_a_sample_with_several_captions_count(tmp_path, image, capsys):
    _write(tmp_path, image, meta={"captions": "random-line"}, caption=b"a\nb c")
    inspect(str(tmp_path), None)
    lines = _lines(capsys)
    assert {"captions 11", "caption words min 0, median 1, max 2"} < set(lines)
    assert "empty captions 1 (9.1%)" in lines


def test_of_a_remote_set_no_tar_is_fetched(bucket, image, capsys):
    _write(storage.join(bucket, "s"), image)
    inspect(storage.join(bucket, "s"), None)
    assert "6 images in 2 shards" in capsys.readouterr().out
    assert not [p for p in storage.cache_folder().rglob("*") if p.name.endswith(".tar")]


def test_the_contact_sheet_shows_what_can_be_decoded(tmp_path, image, capsys):
    _write(tmp_path / "s", image)
    inspect(str(tmp_path / "s"), str(tmp_path / "new" / "sheet.png"))
    said = capsys.readouterr().out
    assert "contact sheet of 5 images; 1 more cannot be decoded" in said
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        colours = {colour: n for n, colour in sheet.getcolors()}
    assert colours[(255, 0, 0)] == 5 * 96 * 96
    assert colours[(0, 0, 0)] > 50  # captions


def test_the_contact_sheet_reads_a_few_shards(tmp_path, image, capsys):
    _write(tmp_path / "s", image, 48, 2)
    for shard in range(1, 24, 2):
        (tmp_path / "s" / f"{shard:05d}.tar").unlink()
    inspect(str(tmp_path / "s"), str(tmp_path / "sheet.png"))
    assert "contact sheet of 23 images; 1 more" in capsys.readouterr().out


def _write_tokens(folder, crops=1):
    meta = {"image_tokenizer": "0123456789abcdef", "grid": 2, "codebook_size": 64, "crops": crops}
    with ShardWriter(str(folder), "tokens", meta | {"flip": crops > 1}, 4) as writer:
        for i in range(6):
            buffer = io.BytesIO()
            codes = np.arange(4, dtype=np.uint16) + i
            np.save(buffer, np.stack([codes] * crops) if crops > 1 else codes)
            writer.write(f"{i}", {"npy": buffer.getvalue(), "txt": b"two words"})


def test_token_shards_are_described_by_their_codes_and_tokenizer(tmp_path, capsys):
    _write_tokens(tmp_path / "one")
    _write_tokens(tmp_path / "two", 2)
    inspect(str(tmp_path / "one"), None)
    lines = _lines(capsys)
    assert lines[0].startswith(f"{tmp_path}/one: 6 tokens in 2 shards")
    assert lines[-3:] == [
        "image tokenizer 0123456789abcdef",
        "crops of an image 1, of 4 codes each: 6 images",
        "codes in use 9 of 64, in 2 shards",
    ]
    assert "captions 6" in lines
    inspect(str(tmp_path / "two"), None)
    assert "crops of an image 2, some mirrored, of 4 codes each: 6 images" in _lines(capsys)


def test_a_contact_sheet_of_tokens_is_refused(tmp_path, capsys):
    _write_tokens(tmp_path / "s/train")
    command = ["data", "inspect", str(tmp_path / "s"), "--contact-sheet", str(tmp_path / "x.png")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds tokens" in line and "train-preview.png" in line
    assert not (tmp_path / "x.png").exists()


def test_tars_without_an_index_are_one_line_that_says_what_makes_one(tmp_path, image, capsys):
    _write(tmp_path, image)
    (tmp_path / "index.json").unlink()
    assert main(["data", "inspect", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'dalle-dist data index {tmp_path}'" in line
    shutil.rmtree(tmp_path)
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "no shards here" in capsys.readouterr().err
