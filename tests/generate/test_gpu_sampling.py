"""On a GPU: a replayed graph gives the tokens of steps from the host, and those without a cache."""

import pytest
import torch
from tiny_generator import build, text

from dalle_dist.generate.noise import gumbel
from dalle_dist.generate.sampler import Draw, choose, sample_codes
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.generate.sequential import State
from dalle_dist.text_tokenizer.protocol import PAD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SEEDS = [3, 5, 7]


@torch.no_grad()
def naive(model, text_BT, sampling):
    """Every token from all logits of the whole sequence, computed anew."""
    codes_BN = torch.zeros(3, 16, device="cuda").long()
    seed_B = torch.tensor(SEEDS, device="cuda")
    for position in range(16):
        logits_BK = model.logits(text_BT, codes_BN)[1][:, position]
        empty_BK = model.logits(torch.full_like(text_BT, PAD), codes_BN)[1][:, position]
        logits_BK = empty_BK + sampling.guidance * (logits_BK - empty_BK)
        noise_BK = gumbel(seed_B, torch.full_like(seed_B, position), 20)
        codes_BN[:, position] = choose(logits_BK, noise_BK, sampling)
    return codes_BN


@pytest.mark.parametrize("masks", ["paper", "causal"])
@pytest.mark.parametrize("variant", ["paper", "clamp", "torus", "dalle-pytorch"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_tokens_are_those_without_a_cache(masks, variant, guidance):
    model = build(f"transformer.masks={masks}", f"transformer.mask_variant={variant}").model.cuda()
    sampling = Sampling(guidance=guidance)
    expected_BN = naive(model, text().cuda(), sampling)
    for window in (None, 4):
        found_BN = sample_codes(model, text().cuda(), SEEDS, sampling, window=window)
        assert found_BN.equal(expected_BN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "top_k": 5, "top_p": 0.9}])
def test_a_graph_gives_the_tokens_of_steps_from_the_host(dtype, options):
    model = build().model.cuda()
    model.blocks.to(dtype)
    kept_BN = torch.full((3, 16), -1, device="cuda")
    kept_BN[:, :5], kept_BN[1, 9] = 2, 4
    draw = Draw(model, text().cuda(), SEEDS, Sampling(**options), kept_BN)
    with torch.no_grad():
        state = State(draw)
        for position in range(draw.prefix, 16):
            state.step(position)
    found_BN = sample_codes(model, text().cuda(), SEEDS, draw.sampling, kept_codes=kept_BN)
    assert found_BN.equal(state.codes_BN)
