"""Steps that are skipped for a loss that is not finite, and runs of such steps."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import tiny_run
import torch

from dalle_dist.errors import UserError
from dalle_dist.testing import run_distributed
from dalle_dist.train import skips
from dalle_dist.train import transformer as program
from dalle_dist.train.run import read_log
from dalle_dist.train.skips import Skips
from dalle_dist.transformer.loss_model import LossTransformer

POISON = "pink boat"
forward = LossTransformer.forward


def poisoned(self, text_BT, *others):
    """As it is, but that the loss of a sample with this text is not a number."""
    found = forward(self, text_BT, *others)
    return found * torch.nan if bool((text_BT == self.poison).all(1).any()) else found


def train(ranks, config, *more):
    """One sample of an epoch makes the loss a NaN. What each run ends with."""
    warnings.simplefilter("ignore")
    tokenizer = program.load_text_tokenizer("bpe", config.paths.tokenizer)
    ids, _ = tokenizer.encode_padded(POISON, config.transformer.text_tokens)
    LossTransformer.poison, LossTransformer.forward = torch.tensor(ids), poisoned
    found = []
    for one, resume in [(config, None), *more]:
        try:
            program.train(one, resume)
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("skips"), steps=8, save_every=100, micro_batch=2)


def named(config, folder, **changes):
    return dataclasses.replace(
        tiny_run.with_paths(config, run=f"{Path(config.paths.run).parent}/{folder}"),
        train=dataclasses.replace(config.train, **changes),
    )


def bad_lines(config):
    return [line for line in read_log(config.paths.run) if "bad_samples" in line]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "fp32"),
        (3, "fp16"),
        *(
            pytest.param(stage, precision, marks=pytest.mark.slow)
            for stage in (0, 1, 2, 3)
            for precision in ("fp32", "bf16", "fp16")
            if (stage, precision) not in ((2, "fp32"), (3, "fp16"))
        ),
    ],
)
def test_a_loss_that_is_no_number_is_skipped_named_and_learned_past(inputs, stage, precision):
    config = named(inputs, f"{stage}-{precision}", zero_stage=stage, precision=precision)
    assert run_distributed(train, 2, config) == [[""], [""]]
    (line,) = bad_lines(config)
    assert any("pink-boat" in sample for sample in line["bad_samples"])
    assert len(line["bad_samples"]) == 2  # of one micro-batch of one rank
    losses = {
        entry["step"]: entry["loss"] for entry in read_log(config.paths.run) if "loss" in entry
    }
    assert losses.pop(line["step"]) is None and None not in losses.values()
    assert losses[8] < losses[1]


def test_without_a_budget_it_ends_the_run_and_with_one_the_resumed_run_steps_over(inputs):
    strict, lenient = (named(inputs, "budget", skip_budget=budget) for budget in (0, 1))
    first, last = run_distributed(train, 2, strict, (lenient, "auto"))
    assert first == last and "train.skip_budget is 0" in first[0] and first[1] == ""
    assert read_log(lenient.paths.run)[-1]["step"] == 8


def test_a_run_that_skips_most_steps_is_not_complete(monkeypatch):
    monkeypatch.setattr(skips, "WINDOW", 10)
    counted = Skips("runs/x", "train", 100)
    for step in range(9):
        counted.add(skipped=step % 2 == 0, bad_loss=False)
    with pytest.raises(UserError, match="most of 9 steps were skipped"):
        counted.refuse_most()
    counted.add(skipped=False, bad_loss=False)
    counted.refuse_most()
    counted.add(skipped=False, bad_loss=False)
    with pytest.raises(UserError, match="most of the last 10 steps"):
        for _ in range(10):
            counted.add(skipped=True, bad_loss=False)
