"""Runs whose loss leaps up: told of, or gone back from, past the samples that it came with."""

import math

import pytest
import tiny_run

from dalle_dist.config import from_dict, to_dict
from dalle_dist.errors import UserError
from dalle_dist.testing import run_distributed
from dalle_dist.train.loop import train_stage
from dalle_dist.train.run import read_log
from dalle_dist.train.transformer import TransformerStage

STEPS, EVERY, FAULT = 60, 10, 34  # the step in which something happens to the weights or the loss
BATCH = 8


class Faulty(TransformerStage):
    """A stage with a fault; `faults` are the steps that it comes in, each once in a process."""

    fault, faults, seen = "weights", (FAULT,), []

    def loss(self, engine, micro_batch, counts, step):
        self.seen.append((step, [row[0] for row in micro_batch.codes.tolist()]))
        faulty = step in self.faults
        type(self).faults = tuple(other for other in self.faults if other != step)
        if faulty and self.fault == "weights":
            for piece in engine.owned():
                piece.values.mul_(4)
            engine.module.load_state_dict(
                {name: value * 4 for name, value in engine.module.state_dict().items()}
            )
        loss, shares = super().loss(engine, micro_batch, counts, step)
        if faulty and self.fault == "nan":
            loss, shares = loss * math.nan, shares * math.nan
        return loss, shares


def configured(folder, **watch):
    config = tiny_run.make(
        folder, steps=STEPS, save_every=EVERY, eval_every=STEPS, prompts=[], micro_batch=8,
        zero_stage=0, keep=99,
    )  # fmt: skip
    return from_dict(to_dict(config) | {"watch": {"spike_steps": 3} | watch})


def trained(config, kind="weights", faults=(FAULT,), resume=None):
    Faulty.fault, Faulty.faults, Faulty.seen = kind, faults, []
    train_stage(Faulty, config, resume)
    return Faulty.seen


def logged(config):
    lines = read_log(config.paths.run)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return losses, [line for line in lines if "rolled_back_from" in line]


def test_a_run_goes_back_and_passes_the_samples_over(tmp_path, capsys):
    config = configured(tmp_path, on_spike="rollback")
    trained(config)
    losses, (line,) = logged(config)
    assert list(losses) == list(range(1, STEPS + 1)), "each step once"
    assert line["step"] == 30 and FAULT < line["rolled_back_from"] <= FAULT + 4
    assert line["goes_on_at_sample"] == BATCH * line["rolled_back_from"]
    assert losses[STEPS] < losses[30], "the weights of the spike are gone"
    said = capsys.readouterr().out
    assert "going back to the last checkpoint" in said
    assert f"samples 240 to {line['goes_on_at_sample'] - 1}" in said
    assert (tmp_path / "run/release/config.yaml").exists()


def test_a_run_that_ends_after_it_went_back_passes_over_the_same_samples(tmp_path, monkeypatch):
    """Cut off before its next checkpoint, which would have them."""
    config = configured(tmp_path / "one", on_spike="rollback")
    whole = trained(config)
    other = configured(tmp_path / "two", on_spike="rollback")

    class Ends(Faulty):
        def loss(self, engine, micro_batch, counts, step):
            if step == 36 and self.seen[-1][0] == 35 and len(self.seen) > 40:
                raise KeyboardInterrupt
            return super().loss(engine, micro_batch, counts, step)

    Faulty.fault, Faulty.faults, Faulty.seen = "weights", (FAULT,), []
    with pytest.raises(KeyboardInterrupt):
        train_stage(Ends, other)
    after = trained(other, faults=(), resume="auto")
    assert after[0][0] == 31
    assert after == whole[-len(after) :]
    assert logged(config)[0] == logged(other)[0]


def test_losses_that_are_not_finite_send_it_back_too(tmp_path):
    config = configured(tmp_path, on_spike="rollback")
    trained(config, "nan", (34, 35, 36))
    losses, (line,) = logged(config)
    assert line["rolled_back_from"] == 36 and list(losses) == list(range(1, STEPS + 1))
    assert all(map(math.isfinite, losses.values()))


def test_more_often_than_may_be_ends_the_run(tmp_path):
    config = configured(tmp_path, on_spike="rollback", rollbacks=1)
    with pytest.raises(UserError, match=r"leapt up again after 1 rollbacks \(watch.rollbacks\)"):
        trained(config, "nan", range(34, 60))


def test_by_default_a_spike_is_told_of(tmp_path, capsys):
    config = configured(tmp_path)
    trained(config)
    losses, lines = logged(config)
    assert list(losses) == list(range(1, STEPS + 1)) and lines == []
    (note,) = [line for line in read_log(config.paths.run) if "loss_spike" in line]
    assert FAULT < note["step"] <= FAULT + 4
    assert "watch.on_spike=rollback would go back" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_go_back_together(tmp_path, stage):
    config = configured(tmp_path, on_spike="rollback")
    tree = to_dict(config)
    tree["train"] |= {"zero_stage": stage, "micro_batch": 4}
    config = from_dict(tree)
    run_distributed(_spiked, 2, config, timeout=240)
    losses, lines = logged(config)
    assert list(losses) == list(range(1, STEPS + 1)) and len(lines) == 1
    assert losses[STEPS] < losses[30]


class NotFinite(TransformerStage):
    """Whose loss is NaN in three steps, the first time that they come."""

    left = 3

    def loss(self, engine, micro_batch, counts, step):
        loss, shares = super().loss(engine, micro_batch, counts, step)
        if step >= FAULT and self.left:
            type(self).left -= 1
            loss, shares = loss * math.nan, shares * math.nan
        return loss, shares


def _spiked(ranks, config):
    train_stage(NotFinite, config)
