"""ruDALL-E: imported, computed, sampled, fine-tuned and written back."""

from dataclasses import replace

import pytest
import rudalle_by_hand as by_hand
import torch
import vqgan_by_hand
from fine_tuning import assert_loss_falls
from malicious import write_malicious

from dalle_dist import Generator
from dalle_dist.errors import CheckpointError, ConfigError, DataError
from dalle_dist.interop import rudalle_files
from dalle_dist.interop.importing import model_of, parity, write_release

GRID, TEXT, CLASSES, HEADS = 13, 4, 20, 2
# Of a word each; pad, unknown, begin and end before them.
MODEL = "6 2\n9601 4\n97 5\n98 6\n99 7\n100 8\n101 9\n5 6 10\n4 10 11\n1 0 2 3\n"


def written(folder, version=3, layers=6, masks=True, gumbel=True, **shape):
    """A folder as the program's users have it; returns the transformer's state."""
    sizes = {"text": TEXT, "grid": GRID, "classes": CLASSES, "codes": 20} | shape
    state = by_hand.weights(layers=layers, **sizes)
    saved = by_hand.with_masks(state, version, TEXT, GRID) if masks else state
    torch.save(saved, folder / f"pytorch_model_v{version}.bin")
    images = vqgan_by_hand.weights(gumbel=gumbel)
    checkpoint = {"state_dict": images | {"loss.logvar": torch.ones(1)}}
    torch.save(checkpoint, folder / "vqgan.gumbelf8-sber.model.ckpt")
    (folder / "bpe.model").write_text(MODEL)
    return state


@pytest.fixture(params=[2, 3])
def version(request):
    return request.param


@pytest.fixture
def inputs():
    made = torch.Generator().manual_seed(1)
    text_BT = torch.randint(1, CLASSES, (2, TEXT), generator=made)
    text_BT[1, 2:] = 0
    return text_BT, torch.randint(20, (2, GRID**2), generator=made)


@pytest.mark.parametrize("layers", [5, 6, 7])
@torch.no_grad()
def test_logits_are_those_of_the_equations(tmp_path, inputs, version, layers):
    state = written(tmp_path, version, layers)
    model = model_of(rudalle_files.load([tmp_path], heads=HEADS))
    text_BTV, image_BNK = model.logits(*inputs)
    wanted = by_hand.logits(state, *inputs, version, HEADS, CLASSES)
    first = 0 if version == 2 else 1
    assert wanted[1].std() > 0.3
    assert (text_BTV - wanted[0])[:, first:].abs().max() < 1e-5
    assert (image_BNK - wanted[1]).abs().max() < 1e-5


@torch.no_grad()
def test_steps_give_the_logits_of_the_whole(tmp_path, inputs, version):
    written(tmp_path, version)
    model = model_of(rudalle_files.load([tmp_path], heads=HEADS))
    text_BT, codes_BN = inputs
    wanted_BNK = model.logits(text_BT, codes_BN)[1]
    caches = model.prefill(text_BT, [1, 1])
    held_BN = torch.cat([torch.full((2, 1), model.start), codes_BN], dim=1)
    for at in range(GRID**2):
        found_B1K = model.step(held_BN[:, at : at + 1], caches, at)
        torch.testing.assert_close(found_B1K[:, 0], wanted_BNK[:, at], rtol=0, atol=1e-5)


def test_pads_are_classes_of_their_positions(tmp_path, inputs):
    written(tmp_path)
    model = model_of(rudalle_files.load([tmp_path], heads=HEADS))
    (text_MV, targets_M), _ = model.predictions(*inputs)
    assert text_MV.shape[1] == CLASSES + TEXT
    # The pad that ends the second text stands at position 2.
    assert targets_M.tolist()[-2:] == [int(inputs[0][1, 1]), CLASSES + 2]


def test_embeddings_learn_a_tenth_as_fast(tmp_path, inputs):
    written(tmp_path)
    model = model_of(rudalle_files.load([tmp_path], heads=HEADS)).requires_grad_(True)
    found = model.embed_text(inputs[0][:1])
    found.sum().backward()
    row = model.text_embedding.weight.grad[inputs[0][0, 0]]
    times = int((inputs[0][0] == inputs[0][0, 0]).sum())
    torch.testing.assert_close(row, torch.full_like(row, 0.1 * times))


def test_blocks_learn_in_bf16(tmp_path, inputs):
    written(tmp_path)
    exact, half = (model_of(rudalle_files.load([tmp_path], heads=HEADS)) for _ in range(2))
    half.blocks.bfloat16()
    for model in (exact, half):
        model.requires_grad_(True)
        _, (image_MK, codes_M) = model.predictions(*inputs)
        assert image_MK.dtype == torch.float32
        torch.nn.functional.cross_entropy(image_MK, codes_M).backward()
    wanted, found = (model.blocks[2].attention.qkv.weight.grad.float() for model in (exact, half))
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


def test_import_generates_and_learns(tmp_path, version):
    (tmp_path / "theirs").mkdir()
    written(tmp_path / "theirs", version)
    imported = rudalle_files.load([tmp_path / "theirs"], heads=HEADS)
    release = str(tmp_path / "release")
    write_release(imported, release)
    assert max(parity(imported, release).values()) == 0
    image, other = Generator.load(release).generate(["ab", "e"], seed=1)
    assert image.image.size == (2 * GRID, 2 * GRID)
    assert not torch.equal(image.codes_N, other.codes_N)
    assert_loss_falls(release, "ab c")


def test_export_gives_the_files_back(tmp_path, version):
    (tmp_path / "theirs").mkdir()
    state = written(tmp_path / "theirs", version)
    imported = rudalle_files.load([tmp_path / "theirs"], heads=HEADS)
    files = rudalle_files.export(imported, tmp_path / "back")
    transformer = torch.load(files[0], weights_only=True)
    wanted = by_hand.with_masks(state, version, TEXT, GRID)
    assert sorted(transformer) == sorted(wanted)
    assert all(torch.equal(transformer[name], wanted[name]) for name in wanted)
    images = torch.load(files[1], weights_only=True)["state_dict"]
    wanted = vqgan_by_hand.weights(gumbel=True)
    assert sorted(images) == sorted(wanted)
    assert all(torch.equal(images[name], wanted[name]) for name in wanted)
    assert files[2].read_text() == MODEL
    for file in files:
        assert file.stat().st_size <= (tmp_path / "theirs" / file.name).stat().st_size + 1000
    again = rudalle_files.load([tmp_path / "back"], heads=HEADS)
    assert again.config == imported.config


def test_released_sizes_know_their_heads_and_files_their_version(tmp_path):
    meta = {"classes": 16384, "text": 128, "grid": 32, "codes": 8192}
    names = by_hand.weights(layers=24, width=8)
    wide = {name: torch.empty(0).expand(0) for name in names}
    wide["text_embeddings.weight"] = torch.zeros(1, 1).expand(meta["classes"] + 128, 2048)
    wide["image_embeddings.weight"] = torch.zeros(1, 1).expand(8192, 2048)
    wide["text_pos_embeddings.weight"] = torch.zeros(1, 1).expand(129, 2048)
    wide["image_row_embeddings.weight"] = torch.zeros(1, 1).expand(32, 2048)
    for version in (2, 3):
        config = rudalle_files._config(wide, f"pytorch_model_v{version}.bin", None, None)
        assert config.transformer.heads == 16 and config.tokenizer.vocab_size == 16384
        assert config.interop.options == {"version": version}
    with pytest.raises(CheckpointError, match="say which it is"):
        rudalle_files._config(wide, "pytorch_model.bin", None, None)
    assert rudalle_files._config(wide, "a.bin", None, 2).transformer.mask_variant == "torus"


def remove(name):
    return lambda folder: (folder / name).unlink()


def damage_masks(folder):
    path = folder / "pytorch_model_v3.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"transformer.conv_mask": torch.ones(3, 3)}, path)


def add_weight(folder):
    path = folder / "pytorch_model_v3.bin"
    torch.save(torch.load(path, weights_only=True) | {"more.weight": torch.ones(3)}, path)


def nothing(folder):
    pass


def break_model(folder):
    (folder / "bpe.model").write_text("x")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (remove("bpe.model"), {}, r"0 files hold its text.*bpe\.model"),
        (remove("vqgan.gumbelf8-sber.model.ckpt"), {}, r"0 files hold its image .*vqgan\."),
        (remove("pytorch_model_v3.bin"), {}, "0 files hold its transformer"),
        (damage_masks, {}, "fits no version"),
        (add_weight, {}, r"'more\.weight'"),
        (nothing, {"heads": None}, "unknown heads"),
        (nothing, {"heads": 3}, "3 heads"),
        (nothing, {"version": 2}, r"fits \[3\] version"),
        (break_model, {}, "not a model"),
    ],
)
def test_refusals_are_one_line(tmp_path, change, arguments, message):
    written(tmp_path)
    change(tmp_path)
    with pytest.raises((CheckpointError, DataError), match=message) as raised:
        rudalle_files.load([tmp_path], **{"heads": HEADS} | arguments)
    assert "\n" not in str(raised.value)


def test_another_models_export_is_refused(tmp_path):
    written(tmp_path)
    imported = rudalle_files.load([tmp_path], heads=HEADS)
    other = replace(imported.config.tokenizer, kind="yttm")
    config = replace(imported.config, tokenizer=other)
    with pytest.raises(ConfigError, match="cannot hold"):
        rudalle_files.export(replace(imported, config=config), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_files_are_recognised(tmp_path):
    (tmp_path / "theirs").mkdir()
    written(tmp_path / "theirs")
    assert rudalle_files.detect([tmp_path / "theirs"])
    assert not rudalle_files.detect([tmp_path / "theirs/vqgan.gumbelf8-sber.model.ckpt"])


@pytest.mark.parametrize("name", ["pytorch_model_v3.bin", "vqgan.gumbelf8-sber.model.ckpt"])
def test_a_file_that_runs_a_command_is_refused_and_not_run(tmp_path, name):
    written(tmp_path)
    write_malicious(tmp_path / name, tmp_path / "mark")
    with pytest.raises(CheckpointError, match=name) as raised:
        rudalle_files.load([tmp_path], heads=HEADS)
    assert "\n" not in str(raised.value) and not (tmp_path / "mark").exists()
