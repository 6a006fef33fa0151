"""minDALL-E: imported, computed, sampled, fine-tuned and written back."""

import json
from dataclasses import replace

import mindalle_by_hand as by_hand
import pytest
import tokenizers
import torch
import vqgan_by_hand
import yaml
from fine_tuning import assert_loss_falls
from malicious import write_malicious

from dalle_dist import Generator
from dalle_dist.errors import CheckpointError, ConfigError, DataError
from dalle_dist.interop import mindalle_files, registry
from dalle_dist.interop.importing import model_of, parity, write_release

GRID, TEXT, HEADS = 4, 6, 2
CAPTIONS = ["a red heart", "a red car", "the cat reads"] * 3


@pytest.fixture
def folder(tmp_path):
    """As the program's users have it; the pad is class 3."""
    folder = tmp_path / "theirs"
    (folder / "tokenizer").mkdir(parents=True)
    made = tokenizers.CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    made.train_from_iterator(CAPTIONS, vocab_size=40, special_tokens=special, show_progress=False)
    tree = json.loads(made.to_str())["model"]
    (folder / "tokenizer/bpe-16k-vocab.json").write_text(json.dumps(tree["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tree["merges"])]
    (folder / "tokenizer/bpe-16k-merges.txt").write_text("\n".join(merges) + "\n")
    torch.save({"state_dict": transformer(folder)}, folder / "stage2_last.ckpt")
    images = vqgan_by_hand.weights()
    torch.save({"state_dict": images | {"loss.logvar": torch.ones(1)}}, folder / "stage1_last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"stage2": {"hparams": {"n_heads": HEADS}}}))
    return folder


def transformer(folder):
    return by_hand.weights(classes=vocabulary(folder).get_vocab_size(), grid=GRID, text=TEXT)


def vocabulary(folder):
    files = (folder / f"tokenizer/bpe-16k-{name}" for name in ("vocab.json", "merges.txt"))
    tokenizer = tokenizers.CharBPETokenizer.from_file(
        *map(str, files), unk_token="[UNK]", lowercase=True
    )
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.enable_padding(length=TEXT, pad_id=tokenizer.token_to_id("[PAD]"))
    tokenizer.enable_truncation(max_length=TEXT)
    return tokenizer


def codes(size=2):
    return torch.randint(20, (size, GRID**2), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_of_captions_are_those_of_the_equations(folder, tmp_path):
    imported = mindalle_files.load([folder])
    write_release(imported, str(tmp_path / "release"))
    generator = Generator.load(tmp_path / "release")
    captions = ["A red  heart", "the"]
    rows = [generator.tokenizer.encode_padded(caption, TEXT)[0] for caption in captions]
    text_BTV, image_BNK = generator.model.logits(torch.tensor(rows), codes())
    state, theirs = transformer(folder), vocabulary(folder)
    ids = torch.tensor([theirs.encode(caption).ids for caption in captions])
    assert (ids == 3).any()
    wanted = by_hand.logits(state, ids, codes(), HEADS)
    assert wanted[1].std() > 0.3
    order = list(range(len(state["head_txt.weight"])))
    order[0], order[3] = 3, 0
    assert (text_BTV[:, 1:] - wanted[0][..., order]).abs().max() < 1e-5
    assert (image_BNK - wanted[1]).abs().max() < 1e-5


@torch.no_grad()
def test_steps_give_the_logits_of_the_whole(folder):
    model = model_of(mindalle_files.load([folder]))
    text_BT, codes_BN = torch.randint(0, 15, (2, TEXT)), codes()
    wanted_BNK = model.logits(text_BT, codes_BN)[1]
    caches = model.prefill(text_BT, [1, 1])
    held_BN = torch.cat([torch.full((2, 1), model.start), codes_BN], dim=1)
    for at in range(GRID**2):
        found_B1K = model.step(held_BN[:, at : at + 1], caches, at)
        torch.testing.assert_close(found_B1K[:, 0], wanted_BNK[:, at], rtol=0, atol=1e-5)


def test_the_first_text_token_is_not_learned(folder):
    model = model_of(mindalle_files.load([folder]))
    text_BT = torch.tensor([[5, 6, 7, 0, 0, 0]])
    (_, targets_M), _ = model.predictions(text_BT, codes(1))
    assert targets_M.tolist() == [6, 7, 0]


def test_import_generates_and_learns(folder, tmp_path):
    imported = mindalle_files.load([folder])
    assert registry.detect([folder]) == "mindalle"
    release = str(tmp_path / "release")
    write_release(imported, release)
    assert max(parity(imported, release).values()) == 0
    image, other = Generator.load(release).generate(["red", "cat"], seed=1)
    assert image.image.size == (2 * GRID, 2 * GRID)
    assert not torch.equal(image.codes_N, other.codes_N)
    assert_loss_falls(release, "a red car")


def test_export_gives_the_files_back(folder, tmp_path):
    imported, back = mindalle_files.load([folder]), tmp_path / "back"
    files = mindalle_files.export(imported, back)
    assert all(file.is_file() for file in files)
    for name, wanted in (
        ("stage2_last.ckpt", transformer(folder)),
        ("stage1_last.ckpt", vqgan_by_hand.weights()),
    ):
        found = torch.load(back / name, weights_only=True)["state_dict"]
        assert sorted(found) == sorted(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert (back / name).stat().st_size <= (folder / name).stat().st_size + 1000
    for caption in (*CAPTIONS[:3], "xyz!", ""):
        assert vocabulary(back).encode(caption).ids == vocabulary(folder).encode(caption).ids
    again = mindalle_files.load([back])
    assert again.config == imported.config and again.tokenizer == imported.tokenizer
    told = yaml.safe_load((back / "config.yaml").read_text())
    assert told["stage1"]["hparams"]["attn_resolutions"] == [4]
    assert told["stage2"]["hparams"]["n_layers"] == 3


def edit(name, change):
    def do(folder):
        state = torch.load(folder / name, weights_only=True)["state_dict"]
        torch.save({"state_dict": change(state)}, folder / name)

    return do


def without(key):
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


def config(text):
    return lambda folder: (folder / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "stage1_last.ckpt").unlink(), r"stage1_last\.ckpt: no such file"),
        (lambda folder: (folder / "config.yaml").unlink(), r"config\.yaml: no such file"),
        (edit("stage2_last.ckpt", without("ln_f.bias")), r"norm\.bias"),
        (edit("stage2_last.ckpt", without("tok_emb_txt.weight")), "not minDALL-E's stage 2"),
        (edit("stage2_last.ckpt", without("blocks.1.attn.key.bias")), "not minDALL-E's stage 2"),
        (edit("stage2_last.ckpt", lambda state: {}), "not minDALL-E's stage 2"),
        (edit("stage2_last.ckpt", lambda state: state | {"sos.weight": state["ln_f.bias"]}), "sos"),
        (edit("stage1_last.ckpt", without("quantize.embedding.weight")), "not the .* a VQGAN"),
        (config("stage2: {hparams: {n_heads: 3}}"), "sizes do not fit"),
        (config("stage2: {}"), "does not say stage2"),
        (config("stage2: {hparams: {n_heads: 2, gelu_use_approx: true}}"), "gelu_use_approx"),
        (lambda folder: (folder / "tokenizer/bpe-16k-vocab.json").write_text("x"), "character BPE"),
    ],
)
def test_refusals_are_one_line(folder, change, message):
    change(folder)
    with pytest.raises((CheckpointError, DataError), match=message) as raised:
        model_of(mindalle_files.load([folder]))
    assert "\n" not in str(raised.value)


def test_single_files_and_other_models_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="give minDALL-E's folder"):
        mindalle_files.load([folder / "stage2_last.ckpt"])
    imported = mindalle_files.load([folder])
    other = replace(imported.config.transformer, architecture="paper", width=64, heads=1)
    config = replace(imported.config, transformer=other)
    with pytest.raises(ConfigError, match="cannot hold"):
        mindalle_files.export(replace(imported, config=config), tmp_path / "back")


@pytest.mark.parametrize("name", ["stage1_last.ckpt", "stage2_last.ckpt"])
def test_a_file_that_runs_a_command_is_refused_and_not_run(folder, tmp_path, name):
    write_malicious(folder / name, tmp_path / "mark")
    with pytest.raises(CheckpointError, match=name) as raised:
        mindalle_files.load([folder])
    assert "\n" not in str(raised.value) and not (tmp_path / "mark").exists()
