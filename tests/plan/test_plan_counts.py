"""Plans by their counts: nothing is run, so the paper's sizes are as quick as small ones."""

import pytest

from dalle_dist.cli import main
from dalle_dist.config import load, preset_names
from dalle_dist.errors import ConfigError
from dalle_dist.plan.hardware import hardware, names
from dalle_dist.plan.items import Layout, total
from dalle_dist.plan.model import Model
from dalle_dist.plan.plan import plan
from dalle_dist.train.flop import transformer_flop


@pytest.fixture(scope="module")
def model_12b():
    return Model.of(load("12b"))


def plan_12b(model, *overrides, nodes=128, gpu="h100-80"):
    layout = Layout(nodes, 8)
    return plan(load("12b", ["train.prompts=[]", *overrides]), layout, hardware(gpu), model=model)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_plan(name):
    made = plan(load(name), Layout(1, 1), hardware("h100-80"))
    assert made.gpu_bytes > 4 * made.model.parameters


@pytest.mark.parametrize(("name", "share"), [("2.8b", 0.83), ("5.6b", 0.85), ("12b", 0.86)])
def test_powersgd_leaves_out_what_the_paper_says(name, share):
    made = plan(load(name), Layout(64, 8), hardware("h100-80"))
    assert round(made.share.saved, 2) == share
    factors = sum(i.amount for i in made.traffic.between if i.name in ("P", "Q"))
    whole = 2 * 2 * made.model.matrices / 8 * 63 / 64  # a bf16 all-reduce of a rank's gradient
    assert 1 - factors / whole == pytest.approx(made.share.saved)


def test_model_flop_are_those_that_training_logs():
    config = load("emoji")
    assert Model.of(config).flop == transformer_flop(config)


def test_the_state_of_12b_is_the_papers_parameters_times_their_bytes(model_12b):
    held = {item.name: item.amount for item in plan_12b(model_12b).memory.held}
    eighth = model_12b.parameters / 8
    for name in ("parameters", "gradients"):
        assert held[name] == pytest.approx(4 * eighth, rel=1e-3)
    assert "fp32 masters" not in held  # the shard is its own
    assert held["error buffers"] == 2 * model_12b.matrices / 8
    assert "DeepSpeed's buckets" not in held  # gradients stay where they are until they are sent


def test_half_the_error_buffers_in_1_6_9(model_12b):
    fp32, coded = (
        plan_12b(model_12b, f"parallel.error_dtype={d}").memory.held for d in ("fp32", "1-6-9")
    )
    assert total(fp32) - total(coded) == 2 * model_12b.matrices / 8


def test_more_activations_are_kept_without_checkpoints_and_with_more_samples(model_12b):
    def peak(*overrides):
        return plan_12b(model_12b, *overrides, nodes=16).gpu_bytes

    kept = peak() - peak("train.checkpoint_activations=true")
    assert kept > 60 * 30 * 1280 * 3968  # of some 36 bytes in each layer, 64 of them
    assert peak("train.micro_batch=2") > peak()


def test_what_does_not_fit_is_named_with_its_fix(model_12b):
    made = plan_12b(model_12b, "parallel.error_dtype=fp32", gpu="v100-16")
    assert made.misfits[0].startswith("GPU memory: ")
    assert any("parallel.error_dtype=1-6-9" in line for line in made.misfits)
    assert not any("bf16" in line for line in made.misfits)  # which a V100 has not
    assert not plan_12b(model_12b, gpu="h100-80").misfits


def test_bf16_is_refused_where_the_hardware_has_none(model_12b):
    made = plan_12b(model_12b, "train.precision=bf16", gpu="v100-32")
    assert made.misfits[0] == "v100-32 does not compute in bf16: train.precision=fp16"


def test_the_whole_model_for_samples_is_counted_under_zero_3_only(model_12b):
    def moments(*overrides):
        layout = Layout(128, 8)
        config = load("12b", list(overrides))
        return plan(config, layout, hardware("h100-80"), model=model_12b).memory.moments

    drawn = "train.sample_every=1000"
    whole = {item.name: item.amount for item in moments(drawn)["sample images"]}
    assert whole["whole model on rank 0"] == 2 * model_12b.parameters
    stage_2 = moments(drawn, "train.zero_stage=2")["sample images"]
    assert "whole model on rank 0" not in {item.name for item in stage_2}


def test_inside_a_single_node_nothing_goes_between_nodes():
    made = plan(load("1b"), Layout(1, 8), hardware("h100-80"))
    assert made.traffic.between == ()
    assert total(made.traffic.inside) > 0


def test_a_ring_over_all_nodes_leaves_each_node_once():
    made = plan(load("1b"), Layout(4, 8), hardware("h100-80"))
    assert total(made.traffic.inside) == pytest.approx(7 * total(made.traffic.between))


def test_every_gpu_of_the_file_is_whole():
    for name in names():
        assert hardware(name).memory > 1e9


def test_the_wire_can_be_given():
    assert hardware("h100-80", 100).wire == 100e9
    assert hardware("h100-80").wire == 3200e9


def test_an_unknown_gpu_is_an_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match="h100-80"):
        hardware("abacus")


def test_a_batch_that_does_not_divide_is_an_error_as_in_training():
    with pytest.raises(ConfigError, match="batch_size"):
        plan(load("1b"), Layout(3, 7), hardware("h100-80"))


def test_the_verb_says_by_its_status_whether_the_run_fits(capsys):
    assert main(["plan", "12b", "--nodes", "128", "--gpu", "v100-16"]) == 1
    assert "Does not fit:" in capsys.readouterr().out
    assert main(["plan", "emoji", "--gpus-per-node", "1", "--wire", "25"]) == 0
    assert "Fits." in capsys.readouterr().out
    assert main(["plan", "emoji", "--nodes", "0"]) == 2
    assert "--nodes 0" in capsys.readouterr().err


def test_nodes_that_train_apart_send_little_and_keep_an_anchor_and_a_momentum():
    def made(*overrides):
        config = load("1b", ["train.zero_stage=2", *overrides])
        return plan(config, Layout(4, 8), hardware("h100-80"))

    dense, outer = (made(f"parallel.between_nodes={name}") for name in ("dense", "diloco"))
    int8 = made("parallel.between_nodes=diloco", "parallel.outer_dtype=int8")
    of = {item.name: item.amount for item in outer.traffic.between}
    sent = {item.name: item.amount for item in dense.traffic.between}["sent whole"]
    assert of["outer steps"] == pytest.approx(sent / 2 / 50)
    assert total(int8.traffic.between) < 0.6 * total(outer.traffic.between)
    held = {item.name: item.amount for item in outer.memory.held}
    assert held["anchor and outer momentum"] == pytest.approx(
        2 * held["moving average"] * 4, rel=1e-2
    )
    assert outer.timing.seconds < dense.timing.seconds
