"""First weights: the same by any way of drawing them, normal, and different from one another."""

import pytest
import torch

from dalle_dist.config import load
from dalle_dist.transformer.initial import CHUNK, Initial, fill, initialise
from dalle_dist.transformer.model import Transformer

SHAPE = [
    "transformer.layers=3", "transformer.width=128", "transformer.heads=2",
    "transformer.text_tokens=6", "transformer.image_grid=4", "transformer.conv_kernel=3",
    "tokenizer.vocab_size=50", "dvae.image_size=32", "dvae.downsamplings=3",
    "dvae.codebook_size=20", "transformer.codebook_size=20",
]  # fmt: skip


def drawn(initial, start, stop, seed=1, name="w"):
    out = torch.empty(stop - start)
    fill(out, initial, seed, name, start)
    return out


def test_any_part_is_that_of_the_whole():
    whole = drawn(Initial(0.5), 0, 3 * CHUNK + 17)
    for start, stop in (
        (0, 5),
        (CHUNK - 3, CHUNK + 4),
        (7, 3 * CHUNK + 17),
        (2 * CHUNK, 3 * CHUNK),
    ):
        assert torch.equal(drawn(Initial(0.5), start, stop), whole[start:stop])


def test_values_are_normal_and_hang_on_seed_and_name():
    values = drawn(Initial(0.5, 2.0), 0, 4 * CHUNK)
    assert values.mean().item() == pytest.approx(2.0, abs=0.01)
    assert values.std().item() == pytest.approx(0.5, rel=0.01)
    standard = (values - 2) / 0.5
    assert (standard.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.01)
    chunks = values.view(4, CHUNK)
    assert torch.corrcoef(chunks).fill_diagonal_(0).abs().max() < 0.02
    for other in (
        drawn(Initial(0.5, 2.0), 0, CHUNK, seed=2),
        drawn(Initial(0.5), 0, CHUNK, name="v"),
    ):
        assert torch.corrcoef(torch.stack([other, values[:CHUNK]]))[0, 1].abs() < 0.02


def test_a_deviation_of_zero_is_a_constant():
    assert drawn(Initial(mean=1.0), 3, 9).tolist() == [1.0] * 6


def test_a_model_starts_from_torchs_seed_and_what_it_says():
    config = load("emoji", SHAPE)
    torch.manual_seed(5)
    model = Transformer(config)
    torch.rand(3)  # numbers drawn in between change nothing
    again = Transformer(config)
    with torch.device("meta"):
        unmade = Transformer(config)
    assert unmade.initials() == model.initials()
    assert model.initials().keys() == dict(model.named_parameters()).keys()
    filled = {name: drawn(initial, 0, model.get_parameter(name).numel(), 5, name)
              for name, initial in unmade.initials().items()}  # fmt: skip
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), filled[name]), name
        assert torch.equal(parameter, again.get_parameter(name)), name
    initialise(again, again.initials(), seed=6)
    assert not torch.equal(model.blocks[0].mlp.up.weight, again.blocks[0].mlp.up.weight)
