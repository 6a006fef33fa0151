"""Guessed windows give the tokens of sampling one by one, which are those without any cache."""

import pytest
import torch
from tiny_generator import build, recomputed, text

from benchmarks import generate as benchmark
from dalle_dist.generate.sampler import FREE, Draw, sample_codes
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.generate.windowed import Windows, best_window, sample_windows

SAME = torch.zeros(2, 16).long()
SEEDS = [11, 2**63 + 5, 3]


@pytest.mark.parametrize("masks", ["paper", "causal"])
@pytest.mark.parametrize("variant", ["paper", "clamp", "torus", "dalle-pytorch"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_tokens_are_those_without_cache_or_window(masks, variant, guidance):
    model = build(f"transformer.masks={masks}", f"transformer.mask_variant={variant}").model
    sampling = Sampling(guidance=guidance)
    expected_BN = recomputed(model, text(), SEEDS, sampling)
    for window in (None, 1, 2, 3, 5, 16, 40):
        assert sample_codes(model, text(), SEEDS, sampling, window=window).equal(expected_BN)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_k": 2},
        {"top_p": 0.6, "top_k": 5},
        {"guidance": 3.0, "guidance_schedule": "cosine", "temperature": 0.7},
        {"guidance": 0.0},
    ],
)
def test_tokens_are_the_same_under_every_option(options):
    model, sampling = build().model, Sampling(**options)
    expected_BN = recomputed(model, text(), SEEDS, sampling)
    for window in (None, 4):
        assert sample_codes(model, text(), SEEDS, sampling, window=window).equal(expected_BN)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("pattern", ["prefix", "own prefixes", "scattered", "all"])
def test_kept_tokens_are_kept_and_the_others_follow_them(pattern, guidance):
    model, sampling = build().model, Sampling(guidance=guidance)
    codes_BN = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(1))
    at_N, row_B1 = torch.arange(16), torch.arange(3)[:, None]
    kept_BN = {
        "prefix": (at_N < 7).expand(3, -1),
        "own prefixes": at_N < 3 + 4 * row_B1,
        "scattered": (at_N + row_B1) % 3 == 0,
        "all": (at_N < 16).expand(3, -1),
    }[pattern]
    given = torch.where(kept_BN, codes_BN, FREE)
    expected_BN = recomputed(model, text(), SEEDS, sampling, given)
    assert expected_BN[kept_BN].equal(codes_BN[kept_BN])
    for window in (None, 3, 16):
        found = sample_codes(model, text(), SEEDS, sampling, kept_codes=given, window=window)
        assert found.equal(expected_BN)


def test_what_else_is_in_the_batch_does_not_matter():
    model = build().model
    for window in (None, 4):
        together = sample_codes(model, text(), SEEDS, window=window)
        for i, seed in enumerate(SEEDS):
            alone = sample_codes(model, text()[i : i + 1], [seed], window=window)
            assert alone[0].equal(together[i])


def test_a_window_saves_steps_where_tokens_do_not_hang_on_their_neighbours():
    model = build().model
    assert sample_windows(Draw(model, text(), SEEDS, Sampling()), 1).steps == 16
    free = sample_windows(Draw(model, text(), SEEDS, Sampling()), 4).steps
    for parameter in (model.image_embedding.code.weight, model.image_unembedding.weight):
        parameter.zero_()
    # Every guess is right but the first window's, whose logits were not known.
    certain = sample_windows(Draw(model, text(), SEEDS, Sampling()), 4).steps
    assert certain <= 8 and free > certain + 2


def test_the_benchmark_times_windows_of_equal_tokens(monkeypatch):
    rows = benchmark.windows(build(), 2, (2, 8), rounds=1)
    shares = [row.median for row in rows if row.metric == "share of the steps"]
    assert [row.metric for row in rows].count("speed against one by one") == 2
    assert 0 < shares[1] < shares[0] < 1
    monkeypatch.setattr(benchmark, "sample_windows", lambda draw, window: Windows(0 * SAME, 1))
    with pytest.raises(SystemExit, match="tokens differ"):
        benchmark.windows(build(), 2, (2, 8), rounds=1)


@pytest.mark.parametrize(
    ("device", "samples", "guidance", "window"),
    [
        ("cpu", 1, 1, 16), ("cpu", 1, 2, 16), ("cpu", 4, 1, 8), ("cpu", 8, 1, 4), ("cpu", 8, 2, 1),
        ("cpu", 64, 1, 1), ("cuda", 1, 1, 1), ("cuda", 8, 2, 1),
        ("mps", 1, 1, 1),
    ],
)  # fmt: skip
def test_windows_are_for_few_images(device, samples, guidance, window):
    assert best_window(torch.device(device), samples, Sampling(guidance=guidance)) == window


def test_a_window_of_nothing_is_named():
    with pytest.raises(ValueError, match="window: 0 is below 1"):
        sample_codes(build().model, text(), SEEDS, window=0)
