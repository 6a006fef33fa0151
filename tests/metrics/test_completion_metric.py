"""What a completion keeps, and how its lower part is told from others."""

import pytest
import torch
from tiny_generator import build, text

from dalle_dist.config import load
from dalle_dist.errors import ConfigError
from dalle_dist.generate.sampler import FREE
from dalle_dist.metrics import completion
from dalle_dist.metrics.completion import complete_images, completion_ranks, rows_kept


def test_rows_are_the_upper_half_unless_said():
    assert rows_kept(load("emoji")) == 4
    assert rows_kept(load("emoji", ["train.completion_rows=3"])) == 3
    with pytest.raises(ConfigError, match=r"train\.completion_rows: 8 is not below transformer\."):
        load("emoji", ["train.completion_rows=8"])


def test_the_first_rows_are_given_and_the_others_sampled(monkeypatch):
    generator, kept = build(), []
    codes_BN = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(1))
    sample_images = completion.sample_images

    def spy(*arguments, kept_codes):
        kept.append(kept_codes)
        return sample_images(*arguments, kept_codes=kept_codes)

    monkeypatch.setattr(completion, "sample_images", spy)
    arguments = (generator.model, generator.image_tokenizer, text(), codes_BN, [1, 2, 3])
    complete_images(*arguments, 1)
    assert kept[0][:, :4].equal(codes_BN[:, :4]) and (kept[0][:, 4:] == FREE).all()
    free = complete_images(*arguments, 0)
    assert (kept[1] == FREE).all()
    own = sample_images(generator.model, generator.image_tokenizer, text(), [1, 2, 3])
    assert free.equal(own)


def test_only_what_lies_below_counts():
    true_BCHW = torch.zeros(3, 1, 4, 2)
    true_BCHW[:, :, 2:] = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None]
    completed = true_BCHW.clone()
    completed[:, :, :2] = 9
    assert completion_ranks(completed, true_BCHW, 0.5).tolist() == [1, 1, 1]
    assert completion_ranks(completed.flip(0), true_BCHW, 0.5).tolist() == [3, 1, 3]
    # The third row counts where only a quarter is given.
    completed[0, :, 2:3], completed[0, :, 3:] = 1, 0.4
    assert completion_ranks(completed, true_BCHW, 0.25)[0] > 1
