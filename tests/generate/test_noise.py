"""The noise of samples: SplitMix64's numbers, Gumbel's distribution, nothing shared."""

import math

import pytest
import torch

from dalle_dist.generate import noise
from dalle_dist.generate.noise import gumbel
from dalle_dist.generate.sampler import choose
from dalle_dist.generate.sampling_options import Sampling

MASK = 2**64 - 1


def mix(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def test_the_hash_is_splitmix64():
    """Its first three numbers from state 0 are published with the algorithm's reference code."""
    state = torch.arange(1, 4) * noise._signed(noise.GOLDEN)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [z & MASK for z in noise._mix(state).tolist()] == published


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_numbers_are_those_of_exact_integers(seed):
    found = gumbel(torch.tensor([seed]), torch.tensor([5]), 4)[0]
    key = mix(mix(seed * noise.GOLDEN & MASK) + 5 * noise.GOLDEN & MASK)
    bits = [mix(key + code * noise.GOLDEN & MASK) for code in range(1, 5)]
    shares = [((z >> 11) + 0.5) * 2.0**-53 for z in bits]
    expected = torch.tensor([-math.log(-math.log1p(-share)) for share in shares])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_noise_is_standard_gumbel_and_differs_by_seed_and_position():
    seeds, positions = torch.arange(40).repeat_interleave(25), torch.arange(25).repeat(40)
    found = gumbel(seeds, positions, 500).double()
    assert found.mean().item() == pytest.approx(0.5772, abs=0.006)
    assert found.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert (found < -math.log(math.log(2))).double().mean().item() == pytest.approx(0.5, abs=0.002)
    assert len({tuple(row) for row in found.tolist()}) == 1000
    correlation = torch.corrcoef(found)
    assert (correlation - torch.eye(1000)).abs().max() < 0.25  # five deviations of 1 / sqrt(500)
    assert torch.corrcoef(found.T[:100]).sub(torch.eye(100)).abs().max() < 0.16


def test_noise_is_finite_at_both_ends(monkeypatch):
    for bits in (0, -1):
        monkeypatch.setattr(noise, "_mix", lambda z, bits=bits: torch.full_like(z, bits))
        assert gumbel(torch.tensor([0]), torch.tensor([0]), 2).isfinite().all()


def test_samples_follow_the_probabilities():
    logits_BK = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(30_000, 3)
    noise_BK = gumbel(torch.arange(30_000), torch.full((30_000,), 3), 3)

    def shares(**options):
        drawn = choose(logits_BK, noise_BK, Sampling(**options))
        return (torch.bincount(drawn, minlength=3) / 30_000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert shares(temperature=0.5) == pytest.approx([25 / 38, 9 / 38, 4 / 38], abs=0.01)
    assert shares(top_k=2) == pytest.approx([5 / 8, 3 / 8, 0], abs=0.01)
    assert shares(top_p=0.5) == [1, 0, 0]
    assert shares(top_p=0.6) == pytest.approx([5 / 8, 3 / 8, 0], abs=0.01)
    assert shares(temperature=0) == [1, 0, 0]


def test_samples_of_many_codes_pass_a_chi_square_test():
    logits_K = torch.randn(50, generator=torch.Generator().manual_seed(1))
    draws, options = 200_000, Sampling(temperature=0.8)
    noise_BK = gumbel(torch.arange(draws), torch.zeros(draws).long(), 50)
    counts_K = torch.bincount(choose(logits_K.expand(draws, -1), noise_BK, options), minlength=50)
    expected_K = (logits_K.double() / 0.8).softmax(0) * draws
    statistic = ((counts_K - expected_K) ** 2 / expected_K).sum().item()
    assert statistic < 85.4  # 0.1% of chi-square with 49 degrees of freedom is above
