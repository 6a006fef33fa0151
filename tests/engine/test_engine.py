"""ZeRO 0-3 on two ranks against one process, with a stand-in model; the real one: test_train."""

from dataclasses import replace

import checkpointed
import numpy as np
import pytest
import torch
from torch import nn

from dalle_dist.config import Config, TrainConfig
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.errors import ConfigError
from dalle_dist.gradients.piece import assemble
from dalle_dist.optim.ema import EMA
from dalle_dist.testing import run_distributed

BATCH, CLASSES, STAGES = 8, 11, (0, 1, 2, 3)
TRAIN = TrainConfig(batch_size=BATCH, micro_batch=2, precision="fp32", clip=0.5, lr=1e-2)


class _Toy(nn.Module):
    """Odd sizes, so that the stages cut parameters in the middle and fill up the last pieces."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 7)
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.out = nn.Linear(7, CLASSES)

    def forward(self, tokens_BT):
        h_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            h_BTD = h_BTD + torch.tanh(block(h_BTD))
        logits = self.out(h_BTD).float().flatten(0, 1)
        targets = tokens_BT.roll(1, 1).flatten()
        return nn.functional.cross_entropy(logits, targets, reduction="sum")


def _engine(ranks, stage, precision="fp32", seed=0):
    torch.manual_seed(seed)
    train = replace(TRAIN, precision=precision, zero_stage=stage)
    return build_engine(_Toy(), train, ranks)


def _update(engine, ranks, number):
    """Loss and gradient norm of the update `number`, whose batch no rank count changes."""
    generator = torch.Generator().manual_seed(number)
    tokens_BT = torch.randint(0, CLASSES, (BATCH, 5), generator=generator)
    total = 0.0
    for step in range(engine.accumulation):
        first = (step * ranks.world + ranks.rank) * 2
        loss = engine(tokens_BT[first : first + 2]) / tokens_BT.numel()
        engine.backward(loss)
        total += loss.item()
    return ranks.sum([total])[0], engine.step(1e-2 / (1 + number))


def _whole(engine, ranks, fragments):
    return assemble({k: v for part in ranks.gather(fragments) for k, v in part.items()},
                    engine.shapes)  # fmt: skip


def _course(ranks, stage, precision, folder):
    """5 updates, a save, 3 more; the 3 again after a load; averages and weights put together."""
    engine, ema, curve = _engine(ranks, stage, precision), EMA(0.9), []
    for number in range(5):
        curve.append(_update(engine, ranks, number))
        ema.update(engine.weights())
    checkpoint = checkpointed.save_engine(engine, ranks, folder)
    ahead = [_update(engine, ranks, number) for number in range(5, 8)]
    again = _engine(ranks, stage, precision, seed=99)
    checkpointed.load_engine(again, checkpoint)
    resumed = [_update(again, ranks, number) for number in range(5, 8)]
    raw = _whole(engine, ranks, {f.key: f.values.detach().clone() for f in engine.weights()})
    with engine.sampling_model(_Toy) as model:
        live = {} if model is None else {k: v.clone() for k, v in model.state_dict().items()}
    owned = sum(f.values.numel() for f in engine.weights())
    moments = engine._engine.basic_optimizer.state.values()
    # Tensors in a result would be shared with a process that is about to end: arrays travel.
    return {
        "curve": curve + ahead, "resumed": resumed == ahead,
        "raw": _arrays(raw), "live": _arrays(live),
        "ema": _arrays(_whole(engine, ranks, ema.state([]))), "owned": owned,
        "steps": {int(moment["step"]) for moment in moments},
    }  # fmt: skip


def _arrays(state):
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _courses(ranks, folder, precision):
    outcomes = {}
    for stage in STAGES:
        place = folder / f"{precision}-{stage}"
        if ranks.rank == 0:
            place.mkdir()
        ranks.barrier()
        outcomes[stage] = _course(ranks, stage, precision, place)
    return outcomes


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return run_distributed(_course, 1, 0, "fp32", folder)[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return {p: run_distributed(_courses, 2, folder, p) for p in ("fp32", "bf16")}


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_follow_one_process_in_loss_norm_weights_and_average(alone, pair, stage):
    first, second = (outcomes[stage] for outcomes in pair["fp32"])
    assert first["curve"] == second["curve"]
    assert np.allclose(first["curve"], alone["curve"], rtol=1e-5)
    for kind in ("raw", "ema"):
        for name, weights in alone[kind].items():
            assert np.allclose(first[kind][name], weights, rtol=0, atol=2e-6), (kind, name)
    assert alone["curve"][-1][0] < alone["curve"][0][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_engine_goes_on_bit_for_bit(pair, precision, stage):
    assert all(outcomes[stage]["resumed"] for outcomes in pair[precision])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_wrapper_steps_the_optimizer_by_itself(pair, precision, stage):
    """Some of DeepSpeed's step once at their birth, which would spoil Adam's bias correction."""
    assert [outcomes[stage]["steps"] for outcomes in pair[precision]] == [{8}, {8}]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_fragments_are_the_fp32_masters_of_the_live_weights(pair, precision, stage):
    first, second = (outcomes[stage] for outcomes in pair[precision])
    assert second["live"] == {}
    assert first["live"].keys() == first["raw"].keys()
    for name, live in first["live"].items():
        master = torch.from_numpy(first["raw"][name])
        lowered = master.bfloat16().float() if precision == "bf16" else master
        assert torch.equal(lowered, torch.from_numpy(live)), name
        assert (precision == "bf16") != torch.equal(master, lowered), name
    total = sum(array.size for array in first["raw"].values())
    assert first["owned"] + second["owned"] == total
    if stage > 0:
        assert abs(first["owned"] - second["owned"]) <= 0.1 * total


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_learns_like_fp32(alone, pair, stage):
    curve, expected = (np.array(c["curve"])[:, 0] for c in (pair["bf16"][0][stage], alone))
    assert np.allclose(curve, expected, rtol=2e-2)
    assert not np.array_equal(curve, expected)


def _refusals(ranks):
    """What build_engine says to a contradicting JSON."""
    contradicted = Config(train=replace(TRAIN, deepspeed={"gradient_clipping": 1}))
    with pytest.raises(ConfigError) as at_build:
        build_engine(_Toy(), contradicted.train, ranks)
    return str(at_build.value)


def test_contradicting_json_is_refused_in_one_line():
    said = run_distributed(_refusals, 1)[0]
    assert "gradient_clipping is 1, but train.clip is 0.5" in said
    assert "\n" not in said
