"""Means between nodes that begin in the backward pass; two nodes of two processes, ZeRO-3."""

import contextlib
import io
from dataclasses import replace

import pytest

from dalle_dist.gradients.powersgd.sending import Sending
from dalle_dist.testing import run_distributed
from tests.engine.test_fp16 import backward
from tests.engine.test_nodes import BATCH, build_on, digest

BUCKETS = "train.deepspeed={zero_optimization: {reduce_bucket_size: 20000}}"
WAVES = 5  # four resblocks' matrices, and the rest
CASES = {
    "fp16, in parts, 1-6-9": (
        "powersgd", 2, ["train.precision=fp16", "parallel.error_dtype=1-6-9",
                        "parallel.comm_dtype=1-6-9"],
    ),
    "bf16": ("powersgd", 1, ["train.precision=bf16", "parallel.comm_dtype=bf16"]),
    "fp32, every other step whole": (
        "powersgd", 1, ["train.precision=fp32", "parallel.dense_every=2"],
    ),
    "dense": ("dense", 1, ["train.precision=fp32"]),
}  # fmt: skip


def _steps(ranks, between, parts, overrides, count=3):
    """Digest of the weights; for each step, the waves that had begun when the gradients ended."""
    begun, send = [], Sending.send_up_to

    def told(self, wave, factor_K1):
        begun[-1].append(wave)
        send(self, wave, factor_K1)

    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sending, "send_up_to", told)
        engine = build_on(ranks, 3, between, BUCKETS, *overrides, parts=parts)
        for number in range(count):
            begun.append([])
            backward(engine, ranks, number, BATCH)
            begun[-1].append("end")
            engine.step(3e-3)
    return digest(engine), begun


def _early_and_late(ranks, case):
    between, parts, overrides = CASES[case]
    late = [*overrides, "parallel.overlap=false"]
    return [_steps(ranks, between, parts, given) for given in (overrides, late)]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if "fp16" in c else pytest.mark.slow) for c in CASES]
)
def test_waves_sent_in_the_backward_pass_give_the_same_bits(case):
    for (early, begun), (late, held) in run_distributed(_early_and_late, 4, case):
        assert early == late
        last = WAVES - 1
        assert held == 3 * [["end", last]]
        # Where gradients lie is known from the second step on.
        assert begun == [["end", last]] + 2 * [[*range(last), "end", last]]


def _measured(ranks):
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_on(ranks, 3, "powersgd", BUCKETS, "train.precision=fp16")
        found = []
        for hold in (False, False, True):
            loss = _one_backward(engine, ranks, hold)
            engine.step(3e-3, measure=True)
            found.append((loss, sorted(engine.telemetry())))
    return found


def _one_backward(engine, ranks, hold):
    plain = engine.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "backward", lambda loss: plain(loss, hold=hold))
        return backward(engine, ranks, 0, BATCH)


def test_underflow_is_measured_in_a_step_that_holds_its_gradients():
    for (_, first), (_, early), (_, held) in run_distributed(_measured, 4):
        assert first == held and "underflow" in held
        assert set(held) - set(early) == {"underflow"}


def _moved(ranks):
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_on(ranks, 3, "powersgd", BUCKETS, "train.precision=fp32")
        backward(engine, ranks, 0, BATCH)
        engine.step(3e-3)
        backward(engine, ranks, 1, BATCH)
        gradients = [replace(p, values=p.values.clone()) for p in engine.gradients()]
        engine.gradients = lambda: gradients
        with pytest.raises(RuntimeError, match="moved in memory"):
            engine.reduce()
    return True


def test_gradients_that_moved_after_they_were_sent_are_an_error():
    assert run_distributed(_moved, 4) == 4 * [True]
