"""Tokenizers of another kind: one entry each in a registry, and all else works."""

import json

import pytest
from test_train_dvae import write_images

from dalle_dist import Generator
from dalle_dist.cli import main
from dalle_dist.image_tokenizer import registry as image_registry
from dalle_dist.text_tokenizer import registry as text_registry

SIZES = [
    "dvae.image_size=32", "dvae.downsamplings=3", "transformer.image_grid=4",
    "transformer.codebook_size=9", "transformer.layers=2", "transformer.width=64",
    "transformer.heads=1", "transformer.conv_kernel=3", "transformer.text_tokens=8",
    "tokenizer.kind=letters", "tokenizer.vocab_size=28", "image_tokenizer.kind=brightness",
    "data.workers=0", "train.batch_size=8", "train.micro_batch=4", "train.steps=2",
    "train.warmup=1", "train.zero_stage=0", "train.samples_per_prompt=1",
]  # fmt: skip


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setitem(image_registry.KINDS, "brightness", "tests.train.toy_tokenizers:Brightness")
    monkeypatch.setitem(text_registry.KINDS, "letters", "tests.train.toy_tokenizers:Letters")
    write_images(tmp_path / "images")
    (tmp_path / "theirs").mkdir()
    shape = {"image_size": 16, "grid": 4, "levels": 9}
    (tmp_path / "theirs/brightness.json").write_text(json.dumps(shape))
    (tmp_path / "letters").write_text("2")
    paths = {"images": "images", "tokens": "tokens", "tokenizer": "letters", "run": "run"}
    named = [f"paths.{name}={tmp_path / place}" for name, place in paths.items()]
    return ["emoji", *named, f"image_tokenizer.path={tmp_path / 'theirs'}", *SIZES]


def test_encode_train_generate_and_report_with_tokenizers_of_another_kind(arguments, tmp_path):
    assert main(["encode", *arguments]) == 0
    assert main(["train", *arguments]) == 0
    names = {path.name for path in (tmp_path / "run/release").iterdir()}
    assert {"brightness.json", "tokenizer.json", "transformer.safetensors"} <= names
    assert "dvae.safetensors" not in names
    generator = Generator.load(tmp_path / "run/release")
    (image,) = generator.generate("a red ball", seed=1)
    assert image.image.size == (16, 16) and len(image.codes_N) == 16
    assert generator.tokenizer.decode(generator.tokenizer.encode("A red ball")) == "aredball"
    assert main(["report", *arguments, f"paths.dvae_run={tmp_path}/none"]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "Training the transformer" in page and "Training the dVAE" not in page


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("image_tokenizer.kind=wavelets", "image_tokenizer.kind: 'wavelets' is not one of dvae, "),
        ("tokenizer.kind=words", "tokenizer.kind: 'words' is not one of bpe, "),
        ("transformer.codebook_size=8", "transformer.codebook_size: 8, but the image tokenizer in"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, override, said, capsys):
    assert main(["encode", *arguments]) == 0
    capsys.readouterr()
    assert main(["train", *arguments, override]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
