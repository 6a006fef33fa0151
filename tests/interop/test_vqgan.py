"""VQGANs of minDALL-E (nearest entry) and ruDALL-E (Gumbel) as image tokenizers."""

import pytest
import torch
import vqgan_by_hand as by_hand

from dalle_dist.errors import CheckpointError
from dalle_dist.image_tokenizer.registry import load_image_tokenizer
from dalle_dist.interop.vqgan_tokenizer import VQGANTokenizer, vqgan_of

KINDS = [
    {},
    {"gumbel": True},
    {"multiples": (1, 1, 2), "blocks": 2, "attention": (1, 2), "latent": 8},
]


def loaded(tmp_path, state):
    imported = vqgan_of(
        state, "a.ckpt", 8 if "encoder.down.2.block.0.conv1.bias" not in state else 4
    )
    VQGANTokenizer.save(str(tmp_path), imported.shape, imported.state)
    return load_image_tokenizer("vqgan", str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_images_are_those_of_the_equations(tmp_path, kind):
    state = by_hand.weights(**kind)
    tokenizer = loaded(tmp_path, state)
    pixels = torch.rand(2, 3, 16, 16)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, tokenizer.grid**2)
    assert len(codes.unique()) > 3
    assert torch.equal(codes, by_hand.encode(state, pixels))
    images, wanted = tokenizer.decode(codes), by_hand.decode(state, codes)
    assert wanted.std() > 0.02
    assert (images - wanted).abs().max() < 1e-5


def test_the_shape_is_read_from_the_weights():
    assert vqgan_of(by_hand.weights(**KINDS[2]), "a.ckpt", 16).shape == {
        "width": 32, "multiples": (1, 1, 2), "blocks": 2, "attention": (1, 2), "latent": 8,
        "code_width": 6, "codebook_size": 20, "quantizer": "nearest", "image_size": 64, "grid": 16,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("latent", "levels", "grid", "codebook", "gumbel"),
    [(256, (1, 1, 2, 4), 32, 8192, True), (256, (1, 1, 2, 2, 4), 16, 16384, False)],
)
def test_the_released_shapes(latent, levels, grid, codebook, gumbel):
    names = by_hand.shapes(128, levels, 2, (len(levels) - 1,), latent, latent, gumbel)
    rows = f"quantize.{'embed' if gumbel else 'embedding'}.weight"
    names[rows] = (codebook, latent)
    if gumbel:
        names["quantize.proj.weight"] = (codebook, latent, 1, 1)
        names["quantize.proj.bias"] = (codebook,)
    state = {name: torch.zeros(1).expand(shape) for name, shape in names.items()}
    shape = vqgan_of(state, "a.ckpt", grid).shape
    assert (shape["codebook_size"], shape["image_size"]) == (codebook, 256)


def test_what_trained_it_is_dropped(tmp_path):
    state = by_hand.weights()
    with_loss = state | {"loss.discriminator.main.0.weight": torch.ones(1)}
    tokenizer = loaded(tmp_path, with_loss)
    assert sorted(tokenizer.model.state_dict()) == sorted(state)


def test_half_precision_weights_are_computed_in_fp32(tmp_path):
    state = {name: weight.half() for name, weight in by_hand.weights().items()}
    assert loaded(tmp_path, state).decode(torch.zeros(1, 64).long()).dtype == torch.float32


def without(state, part):
    return {name: weight for name, weight in state.items() if part not in name}


def prefixed(state):
    return {f"model.{name}": weight for name, weight in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed, r"wavelets.*give the plain VQGAN"),
        (lambda state: without(state, "quantize"), "not the checkpoint of a VQGAN"),
        (lambda state: {"a": torch.ones(1)}, "not the checkpoint of a VQGAN"),
        (lambda state: without(state, "decoder.mid.attn_1.q"), "decoder.mid.attn_1.q.bias"),
        (lambda state: state | {"more": torch.ones(1)}, "'more'"),
    ],
)
def test_others_are_refused_in_one_line(change, message):
    with pytest.raises(CheckpointError, match=f"a.ckpt: .*{message}") as error:
        vqgan_of(change(by_hand.weights()), "a.ckpt", 8)
    assert "\n" not in str(error.value)
