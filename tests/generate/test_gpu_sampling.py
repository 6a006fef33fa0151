"""On a GPU: a replayed graph gives the tokens of steps from the host, and those without a cache."""

import pytest
import torch
from tiny_generator import build, recomputed, text

from dalle_dist.generate.sampler import Draw, sample_codes
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.generate.sequential import State

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SEEDS = [3, 5, 7]


@pytest.mark.parametrize("masks", ["paper", "causal"])
@pytest.mark.parametrize("variant", ["paper", "clamp", "torus", "dalle-pytorch"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_tokens_are_those_without_a_cache(masks, variant, guidance):
    model = build(f"transformer.masks={masks}", f"transformer.mask_variant={variant}").model.cuda()
    sampling = Sampling(guidance=guidance)
    expected_BN = recomputed(model, text().cuda(), SEEDS, sampling)
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
