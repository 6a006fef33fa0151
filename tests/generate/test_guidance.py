"""Classifier-free guidance: what is mixed, by which weight, and from which streams."""

import warnings
from unittest.mock import patch

import pytest
import torch
from tiny_generator import build, text

from dalle_dist.generate import sampler
from dalle_dist.generate.sampler import FREE, sample_codes
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.text_tokenizer.protocol import PAD

TOKENS = 16


def rows():
    """Three samples of one caption, one of another, two of the empty one."""
    return torch.cat([text()[:1].expand(3, -1), text()[1:2], torch.full((2, 6), PAD)])


def unbatched(model, text_T, codes_N):
    """Logits_NK of one sample that is generated alone, whatever is chosen."""
    caches, held = model.prefill(text_T[None], [1]), model.image_embedding.start
    logits = []
    for position, code in enumerate(codes_N.tolist()):
        logits.append(model.step(torch.tensor([[held]]), caches, position)[0, 0])
        held = code
    return torch.stack(logits)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("guidance", [0.0, 0.4, 3.0])
def test_guided_logits_are_those_of_two_runs_of_each_sample_alone(guidance, prefix, schedule):
    model, text_BT = build().model, rows()
    sampling = Sampling(guidance=guidance, guidance_schedule=schedule)
    codes = torch.randint(0, 20, (6, TOKENS), generator=torch.Generator().manual_seed(1))
    kept_codes = torch.where(torch.arange(TOKENS) < prefix, codes, FREE)
    guided, guide = [], sampler.guide
    with patch.object(sampler, "guide", lambda *a: guided.append(guide(*a)) or guided[-1]):
        codes_BN = sample_codes(model, text_BT, [1, 2, 3, 4, 5, 6], sampling, kept_codes=kept_codes)
    assert codes_BN[:, :prefix].equal(codes[:, :prefix])
    for b in range(6):
        captioned_NK, empty_NK = (
            unbatched(model, text_T, codes_BN[b]) for text_T in (text_BT[b], torch.full((6,), PAD))
        )
        weights = [sampling.guidance_at(n, TOKENS) for n in range(TOKENS)]
        weight_N1 = torch.tensor(weights)[:, None]
        expected_NK = empty_NK + weight_N1 * (captioned_NK - empty_NK)
        found_NK = torch.stack([step_BNK[b, 0] for step_BNK in guided])
        expected_NK, captioned_NK = expected_NK[prefix:], captioned_NK[prefix:]
        # Logits reach 7, and guidance multiplies their rounding by 5.
        torch.testing.assert_close(found_NK, expected_NK, rtol=1e-5, atol=1e-4)
        assert b > 3 or not torch.allclose(found_NK, captioned_NK, atol=1e-2)


def test_weight_zero_is_the_empty_caption_alone():
    model = build().model
    ignored = sample_codes(model, text(), [1, 2, 3], Sampling(guidance=0))
    assert ignored.equal(sample_codes(model, torch.full((3, 6), PAD), [1, 2, 3]))
    assert not ignored.equal(sample_codes(model, text(), [1, 2, 3]))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_weight_one_runs_no_second_stream(schedule):
    model, widths = build().model, []
    plain = sample_codes(model, rows(), range(6))
    model.blocks[0].mlp.up.register_forward_hook(lambda _, x, __: widths.append(len(x[0])))
    sampling = Sampling(guidance=1, guidance_schedule=schedule)
    assert sample_codes(model, rows(), range(6), sampling).equal(plain)
    assert widths == [3] + [6] * TOKENS  # the captions once, then the samples
    widths.clear()
    sample_codes(model, rows(), range(6), Sampling(guidance=2, guidance_schedule=schedule))
    assert widths == [3] + [12] * TOKENS  # the empty caption once, then both streams together


def test_a_guided_image_does_not_depend_on_what_is_generated_beside_it():
    generator, options = build(), {"seed": 1, "guidance": 3, "guidance_schedule": "cosine"}
    one = generator.generate("a red heart", n=3, **options)
    many = generator.generate(["a blue car", "a red heart"], n=3, batch_size=4, **options)
    assert [a.codes_N.tolist() for a in one] == [b.codes_N.tolist() for b in many[3:]]
    free = generator.generate("a red heart", n=3, seed=1)
    assert [a.codes_N.tolist() for a in one] != [b.codes_N.tolist() for b in free]


def test_schedules_rise_from_one_to_the_guidance():
    def weights(schedule, tokens=5):
        sampling = Sampling(guidance=5, guidance_schedule=schedule)
        return [sampling.guidance_at(position, tokens) for position in range(tokens)]

    assert weights("constant") == [5] * 5
    assert weights("linear") == [1, 2, 3, 4, 5]
    assert weights("cosine") == pytest.approx([1, 3 - 2**0.5, 3, 3 + 2**0.5, 5])
    assert [weights(schedule, 1) for schedule in ("constant", "linear", "cosine")] == [[5]] * 3


@pytest.mark.parametrize(("dropout", "guidance", "told"), [(0, 3, 1), (0, 1, 0), (0.1, 3, 0)])
def test_a_model_that_never_saw_an_empty_caption_is_guided_with_one_warning(
    dropout, guidance, told
):
    generator = build(f"train.caption_dropout={dropout}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generator.generate("a red heart", n=3, batch_size=1, guidance=guidance)
    found = [str(w.message) for w in caught]
    assert len(found) == told
    assert all("guidance 3: the model never saw an empty caption in training" in w for w in found)
