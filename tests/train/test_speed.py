"""The numbers of a log line that say how fast a run goes and how far it is; TensorBoard's tags."""

import dataclasses
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_train_dvae import arguments, write_images
from torch import nn

from dalle_dist.cli import main
from dalle_dist.config import DVAEConfig
from dalle_dist.distributed import process_group
from dalle_dist.dvae.model import DVAE
from dalle_dist.testing import run_distributed
from dalle_dist.train import peak, speed
from dalle_dist.train.data import Progress
from dalle_dist.train.flop import dvae_flop, transformer_flop
from dalle_dist.train.run import read_log
from dalle_dist.train.speed import Speed
from dalle_dist.train.tags import GROUPS, OTHER, tagged
from dalle_dist.train.transformer import train
from dalle_dist.transformer.layout import layer_masks
from tests.tiny_run import make

CPU = torch.device("cpu")


@pytest.mark.parametrize("masks", ["causal", "paper"])
def test_flop_of_the_transformer_are_those_of_its_matrices_and_visible_pairs(tmp_path, masks):
    config = make(tmp_path)
    shape = dataclasses.replace(config.transformer, masks=masks)
    config = dataclasses.replace(config, transformer=shape)
    tokens, width, layers = 8 + 16, 64, 2
    pairs = sum(int(mask.dense().sum()) for mask in layer_masks(shape))
    if masks == "causal":
        assert pairs == layers * tokens * (tokens + 1) // 2
    assert transformer_flop(config) == 6 * layers * 12 * width**2 * tokens + 12 * pairs * width


def test_flop_of_the_dvae_are_those_of_its_convolutions():
    config = DVAEConfig(
        image_size=16, codebook_size=12, width=8, decoder_stem=8, downsamplings=2,
        blocks_per_group=1,
    )  # fmt: skip
    dvae, counted = DVAE(config), []

    def count(conv, _, output):
        counted.append(2 * output.numel() * conv.weight[0].numel())

    for module in dvae.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    dvae(torch.zeros(1, 3, 16, 16), torch.zeros(1, 12, 4, 4), 1.0)
    assert len(counted) > 10
    assert dvae_flop(config, CPU) == 3 * sum(counted)


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        (lambda size: 1.0, [256]),
        # The rate is best at 1024.
        (lambda size: 1e-14 * size**3 * (1 + abs(size - 1024)), [256, 512, 1024, 2048]),
    ],
)
def test_the_peak_is_the_best_of_sizes_that_there_is_time_for(monkeypatch, seconds, sizes):
    monkeypatch.setattr(peak, "_matrices", lambda size, *_: (size, size))
    monkeypatch.setattr(peak, "_product", lambda size, _: seconds(size))
    rates = [2 * size**3 / seconds(size) for size in sizes]
    assert peak.gemm_peak(CPU, torch.float32, seconds=5) == max(rates)


def test_the_peak_is_measured_in_its_dtype_and_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    with mock.patch.object(torch, "mm", wraps=torch.mm) as mm:
        assert peak.gemm_peak(CPU, torch.bfloat16, seconds=0.01) > 0
    assert {argument.dtype for call in mm.call_args_list for argument in call.args} == {
        torch.bfloat16
    }
    assert torch.get_rng_state().equal(state)


def test_numbers_are_of_the_time_since_the_last_line_and_of_all_ranks(monkeypatch):
    clock = iter([100.0, 130.0, 190.0])  # when the first step ended; at each line
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(speed, "gemm_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(speed, "peak_memory", lambda device: 7.0)
    ranks = SimpleNamespace(
        device=CPU,
        barrier=lambda: None,
        sum=lambda x: [2 * v for v in x],
        max=lambda x: [9.0, *x[1:]],
    )
    stage = SimpleNamespace(
        settings=SimpleNamespace(batch_size=20, steps=50), datasets=(range(80), range(3)),
        flop=lambda device: 1e8, dtype=torch.float32, tokens=5,
    )  # fmt: skip
    measured = Speed(stage, ranks)
    measured.add(10.0, waited=3.0)
    measured.add(6.0, waited=1.0)
    assert measured.numbers(step=12, progress=Progress(240, {}, 80)) == pytest.approx(
        {
            "seconds_per_step": 8.0,
            "images_per_s": 2.5,
            "tokens_per_s": 12.5,
            "data_wait": 0.25,
            "mfu": 20 * 1e8 / 8 / 2e9,
            "epoch": 3.0,
            "peak_memory_bytes": 9.0,
            "seconds_left": (130 - 90) / 2 * 38,
        }
    )
    measured.add(4.0, waited=0.0)
    assert measured.numbers(step=13, progress=Progress(260, {}, 80))["images_per_s"] == 5


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(f"{run}/tensorboard").Reload()


def _train(ranks, config):
    warnings.simplefilter("ignore")
    train(config)


def test_all_that_stage_2_logs_has_a_group_and_its_texts_lie_beside(tmp_path):
    config = make(tmp_path, metrics=["losses", "caption_gain", "identification"], zero_stage=0)
    run_distributed(_train, 1, config)
    log = read_log(config.paths.run)
    last = [line for line in log if "mfu" in line][-1]
    assert last["epoch"] == pytest.approx(6 * 8 / 61) and last["seconds_left"] == 0
    assert 0 < last["mfu"] < 2 and last["peak_memory_bytes"] > 1e7
    assert last["tokens_per_s"] == pytest.approx(24 * last["images_per_s"])
    _all_grouped(log, config.paths.run)
    told = events(config.paths.run)
    (text,) = (event.tensor_proto.string_val[0].decode() for event in told.Tensors(
        "prompts/text_summary"))  # fmt: skip
    assert "red heart" in text
    assert "codebook_size: 16" in str(told.Tensors("config/text_summary")[0])


def test_all_that_stage_1_logs_has_a_group(tmp_path):
    write_images(tmp_path / "images")
    assert main(["train-dvae", *arguments(tmp_path, "dvae_train.steps=10")]) == 0
    process_group.shutdown()
    log = read_log(tmp_path / "dvae")
    assert "tokens_per_s" not in log[0] and log[0]["mfu"] > 0
    assert log[0]["epoch"] == pytest.approx(8 / 24) and log[0]["seconds_left"] > 0
    _all_grouped(log, tmp_path / "dvae")


def _all_grouped(log, run):
    names = {name for line in log for name in line} - {"step", "time"}
    wanted = {tag for tag, _ in tagged(dict.fromkeys(names, 0.0))}
    assert not [tag for tag in wanted if tag.startswith(OTHER)]
    assert wanted == set(events(run).Tags()["scalars"])


def test_tags_of_lists_and_of_what_no_group_names():
    found = dict(tagged({"scale": [1.0, 2.0], "loss": 3.0, "mine": 4.0}))
    assert found == {
        "gradients/scale/000": 1.0, "gradients/scale/001": 2.0, "loss/loss": 3.0, "other/mine": 4.0
    }  # fmt: skip
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
