"""A transformer of another program as the rest sees it: sampling and training give one function."""

import pytest
import torch
from torch import nn

from dalle_dist.config import load
from dalle_dist.errors import ConfigError
from dalle_dist.interop.base import Branch, InteropTransformer, attend, checked_options
from dalle_dist.transformer.embeddings import Unembedding

SHAPE = [
    "transformer.architecture=rudalle", "transformer.layers=2", "transformer.width=16",
    "transformer.heads=2", "transformer.text_tokens=5", "transformer.image_grid=3",
    "transformer.codebook_size=11", "tokenizer.vocab_size=20", "image_tokenizer.kind=other",
    "sampling.guidance=1",
]  # fmt: skip


class Looking(Branch):
    """Attention, and the mean with the position before, so that both kinds of memory count."""

    def __init__(self, width):
        super().__init__(width)
        self.qkv = nn.Linear(width, 3 * width)

    def inside(self, h_BNW, place):
        all_BSW = place.everywhere("before", h_BNW)
        at = (place.indices(h_BNW.shape[1], h_BNW.device) - 1).clamp(min=0)
        rows = torch.arange(len(h_BNW))[:, None]
        h_BNW = (h_BNW + all_BSW[rows, at.expand(len(h_BNW), -1)]) / 2
        q, k, v = self.qkv(h_BNW).unflatten(-1, (3, 2, -1)).unbind(2)
        k, v = place.everywhere("k", k), place.everywhere("v", v)
        return attend(q, k, v, place.seen(h_BNW.shape[1]))


class Small(InteropTransformer):
    starts = True

    def __init__(self, config):
        super().__init__(config)
        width = config.transformer.width
        self.text = nn.Embedding(20, width)
        self.code = nn.Embedding(11, width)
        self.place = nn.Parameter(torch.randn(9, width))
        self.blocks = nn.ModuleList(Looking(width) for _ in range(2))
        self.text_out, self.image_out = Unembedding(width, 20), Unembedding(width, 11)

    def embed_text(self, text_BT):
        start_B1 = torch.full_like(text_BT[:, :1], 1)
        return self.text(torch.cat([start_B1, text_BT], dim=1) if self.starts else text_BT)

    def embed_codes(self, codes_BN, at_BN):
        return self.code(codes_BN) + self.place[at_BN]

    def mask(self, layer):
        if layer == 0:
            return None
        seen = torch.ones(self.positions, self.positions, dtype=torch.bool).tril()
        seen[7:, :3] = False
        return seen

    def text_logits(self, x_MW):
        return self.text_out(x_MW)

    def image_logits(self, x_BNW):
        return self.image_out(x_BNW)


class Startless(Small):
    starts = False


@pytest.fixture(params=[Small, Startless])
def model(request):
    torch.manual_seed(0)
    return request.param(load("emoji", SHAPE)).eval().requires_grad_(False)


@pytest.fixture
def text_BT():
    text_BT = torch.randint(2, 20, (3, 5), generator=torch.Generator().manual_seed(1))
    text_BT[0, 2:] = 0
    return text_BT


@pytest.fixture
def codes_BN():
    return torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(2))


def held(model, codes_BN):
    start_B1 = torch.full((len(codes_BN), 1), model.start)
    return torch.cat([start_B1, codes_BN[:, :-1]], dim=1)


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_steps_after_a_prefix_give_the_logits_of_the_whole(model, text_BT, codes_BN, prefix):
    wanted_BNK = model.logits(text_BT, codes_BN)[1]
    caches = model.prefill(text_BT, [1, 1, 1], codes_BN[:, :prefix])
    for at in range(prefix, 9):
        found_B1K = model.step(held(model, codes_BN)[:, at : at + 1], caches, at)
        torch.testing.assert_close(found_B1K[:, 0], wanted_BNK[:, at], rtol=0, atol=1e-5)


def test_windows_replace_guesses_each_sample_at_its_own_position(model, text_BT, codes_BN):
    wanted_BNK = model.logits(text_BT, codes_BN)[1]
    caches, right_BN = model.prefill(text_BT, [1, 1, 1], window=3), held(model, codes_BN)
    spare = torch.cat([right_BN, torch.zeros(3, 6, dtype=torch.long)], dim=1)
    wrong = torch.cat([right_BN[:, :1], torch.zeros(3, 2, dtype=torch.long)], dim=1)
    model.step(wrong, caches, torch.zeros(3, dtype=torch.long))
    for first in ([0, 1, 0], [2, 2, 3], [5, 4, 6], [8, 7, 9]):
        first_B = torch.tensor(first)
        at_BN = first_B[:, None] + torch.arange(3)
        found_BNK = model.step(spare.gather(1, at_BN), caches, first_B)
        for row in range(3):
            inside = at_BN[row] < 9
            wanted = wanted_BNK[row, at_BN[row][inside]]
            torch.testing.assert_close(found_BNK[row][inside], wanted, rtol=0, atol=1e-5)


def test_samples_of_a_caption_share_its_text(model, text_BT, codes_BN):
    caches = model.prefill(text_BT[:2], [2, 1])
    rows = [0, 0, 1]
    for at in range(9):
        found_B1K = model.step(held(model, codes_BN)[:, at : at + 1], caches, at)
    wanted_BNK = model.logits(text_BT[rows], codes_BN)[1]
    torch.testing.assert_close(found_B1K[:, 0], wanted_BNK[:, -1], rtol=0, atol=1e-5)


def test_predictions_are_the_logits_of_the_targets_that_count(model, text_BT, codes_BN):
    (text_MV, targets_M), (image_MK, codes_M) = model.predictions(text_BT, codes_BN)
    text_BTV, image_BNK = model.logits(text_BT, codes_BN)
    counted = [(0, 0), (0, 1), (0, 2), *((row, at) for row in (1, 2) for at in range(5))]
    counted = [(row, at) for row, at in counted if at or model.starts]
    assert targets_M.tolist() == [int(text_BT[row, at]) for row, at in counted]
    torch.testing.assert_close(text_MV, torch.stack([text_BTV[pair] for pair in counted]))
    assert torch.equal(codes_M, codes_BN.flatten())
    torch.testing.assert_close(image_MK, image_BNK.flatten(0, 1))


def test_attention_is_counted_by_its_masks(model):
    positions = 5 + model.starts + 8
    dense = positions * (positions + 1) // 2
    assert model.attention_size() == 16 * (2 * dense - 3 * (positions - 7))


def test_options_are_those_of_the_program():
    config = load("emoji", [*SHAPE, "interop.options={rotary: true}"])
    assert checked_options(config, {"rotary": False}) == {"rotary": True}
    with pytest.raises(ConfigError, match=r"interop.options.rotary: True is not of type int"):
        checked_options(config, {"rotary": 1})
    with pytest.raises(ConfigError, match=r"interop.options.rotary: unknown; there are stable"):
        checked_options(config, {"stable": False})
    with pytest.raises(ConfigError, match=r"interop.options.stable: missing"):
        checked_options(config, {"rotary": False, "stable": False})
