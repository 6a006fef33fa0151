"""What DeepSpeed is given: our values, the user's further settings, and no contradiction."""

import copy
import json
from dataclasses import replace

import pytest

from dalle_dist.config import (
    Config,
    DVAETrainConfig,
    ParallelConfig,
    TrainConfig,
    from_dict,
    load,
    to_dict,
)
from dalle_dist.engine.deepspeed.settings import (
    accumulation,
    check_together,
    deepspeed_config,
    micro_batch,
)
from dalle_dist.errors import ConfigError

FP32 = TrainConfig(batch_size=16, micro_batch=2, precision="fp32")


def test_our_values_are_filled_in():
    tree = deepspeed_config(FP32, 4)
    assert tree["train_batch_size"] == 16
    assert tree["train_micro_batch_size_per_gpu"] == 2
    assert tree["gradient_accumulation_steps"] == 2
    assert tree["gradient_clipping"] == 4.0
    assert (tree["bf16"]["enabled"], tree["fp16"]["enabled"]) == (False, False)
    assert deepspeed_config(replace(FP32, precision="bf16"), 1)["bf16"]["enabled"] is True


@pytest.mark.parametrize("stage", range(4))
def test_the_stage_is_that_of_the_config(stage):
    tree = deepspeed_config(replace(FP32, zero_stage=stage), 1)
    ours = {"stage3_param_persistence_threshold": 0, "contiguous_gradients": False}
    assert tree["zero_optimization"] == {"stage": stage, **(ours if stage == 3 else {})}


def test_further_settings_and_agreeing_values_pass_and_are_not_changed():
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 4,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
        "optimizer": {"type": "AdamW", "params": {"lr": 4.5e-4, "betas": [0.9, 0.96]}},
    }
    train = replace(FP32, deepspeed=copy.deepcopy(given))
    tree = deepspeed_config(train, 1)
    assert tree["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert (tree["gradient_clipping"], tree["train_batch_size"]) == (4.0, 16)
    assert "optimizer" not in tree
    assert train.deepspeed == given


def test_the_first_stage_names_its_own_section():
    dvae_train = DVAETrainConfig(batch_size=6, precision="fp32", deepspeed={"gradient_clipping": 1})
    with pytest.raises(ConfigError, match=r"dvae_train.deepspeed: .* but dvae_train.clip is 0"):
        deepspeed_config(dvae_train, 2)
    with pytest.raises(ConfigError, match=r"dvae_train.batch_size: 6 is not a multiple of 4 ranks"):
        deepspeed_config(dvae_train, 4)
    with pytest.raises(ValueError, match="auto must be decided"):
        deepspeed_config(DVAETrainConfig(), 1)


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"train_batch_size": 32}, ("train_batch_size is 32", "train.batch_size is 16")),
        ({"train_micro_batch_size_per_gpu": 1}, ("gpu is 1", "train.micro_batch is 2")),
        ({"gradient_accumulation_steps": 1}, ("steps is 1", "is 4")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping is 1.0", "train.clip is 4.0")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled is true", "train.precision")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled is true", "train.precision")),
        ({"optimizer": {"type": "Lamb"}}, ('optimizer.type is "Lamb"', "AdamW")),
        ({"optimizer": {"params": {"lr": 1}}}, ("optimizer.params.lr is 1", "train.lr is 0.00045")),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, ("betas is [0.9, 0.999]", "0.96]")),
        ({"optimizer": {"params": {"foo": 1}}}, ("remove 'optimizer.params.foo'",)),
        ({"scheduler": {"type": "WarmupLR"}}, ("remove 'scheduler'", "train.warmup")),
        ({"amp": {"enabled": True}}, ("remove 'amp'", "train.precision")),
        ({"bf16": True}, ("bf16",)),
        ({"zero_optimization": {"stage": 3}}, ("stage is 3", "train.zero_stage is 2")),
        ({"zero_optimization": 2}, ("zero_optimization is 2", "not a section")),
    ],
)
def test_a_contradiction_is_refused_in_one_line_with_key_and_both_values(tree, parts):
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(replace(FP32, deepspeed=tree), 2)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("train.deepspeed: ")
    for part in parts:
        assert part in message


def test_a_batch_that_cannot_be_split_is_refused():
    assert (accumulation(FP32, 4), micro_batch(FP32, 4)) == (2, 2)
    for world in (3, 16):
        with pytest.raises(ConfigError, match=r"train.batch_size: 16 is not a multiple"):
            accumulation(FP32, world)


def test_micro_batch_zero_is_the_ranks_share_of_the_batch():
    whole = replace(FP32, micro_batch=0)
    assert (micro_batch(whole, 4), accumulation(whole, 4)) == (4, 1)
    assert deepspeed_config(whole, 4)["train_micro_batch_size_per_gpu"] == 4
    with pytest.raises(ConfigError, match=r"train.batch_size: 16 is not a multiple of 3 ranks"):
        accumulation(whole, 3)


def test_a_json_file_is_read_when_the_config_is_loaded(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}}))
    config = load("emoji", [f"train.deepspeed={path}", "train.precision=fp32"])
    path.unlink()
    assert config.train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 7}}
    assert from_dict(to_dict(config)) == config
    tree = deepspeed_config(config.train, 1)
    assert tree["zero_optimization"] == {"reduce_bucket_size": 7, "stage": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"zero_optimization": {"stage": 3}}', r"stage is 3, but train.zero_stage is 2"),
        ('{"gradient_clipping": NaN}', "gradient_clipping: nan is not a finite number"),
    ],
)
def test_a_json_file_that_cannot_be_used_is_refused_at_loading(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^train.deepspeed.*{message}") as caught:
        load("emoji", [f"train.deepspeed={path}"])
    assert "\n" not in str(caught.value)


def test_a_missing_json_file_is_refused():
    with pytest.raises(ConfigError, match=r"^train.deepspeed: 'nowhere.json' in .*: No such file"):
        load("emoji", ["train.deepspeed=nowhere.json"])
    with pytest.raises(ConfigError, match=r"^train.deepspeed: 7 is neither keys with values nor"):
        load("emoji", ["train.deepspeed=7"])


def test_deepspeeds_own_fp16_is_refused_under_ours():
    fp16 = replace(FP32, precision="fp16")
    for section in ({"enabled": True}, {"enabled": "auto"}, {"loss_scale": 0}):
        with pytest.raises(ConfigError, match=r"remove 'fp16': train.precision=fp16 has"):
            deepspeed_config(replace(fp16, deepspeed={"fp16": section}), 1)
    tree = deepspeed_config(replace(fp16, deepspeed={"fp16": {"enabled": False}}), 1)
    assert tree["fp16"] == {"enabled": False}


def test_micro_batches_are_summed_in_fp32_unless_the_settings_say_otherwise():
    bf16 = replace(FP32, precision="bf16")
    for further in ({}, {"data_types": {}}, {"data_types": {"grad_accum_dtype": "fp32"}}):
        tree = deepspeed_config(replace(bf16, deepspeed=further), 1)
        assert tree["data_types"] == {"grad_accum_dtype": "fp32"}
    train = replace(bf16, deepspeed={"data_types": {"grad_accum_dtype": "bf16"}})
    tree = deepspeed_config(train, 1)
    assert tree["data_types"] == {"grad_accum_dtype": "bf16"}
    check_together(train, ParallelConfig(), tree)
    for between in ("dense", "powersgd"):
        with pytest.raises(ConfigError, match=r"remove data_types.grad_accum_dtype \(bf16\)"):
            check_together(train, ParallelConfig(between_nodes=between), tree)


def test_averaging_between_nodes_needs_a_sharded_stage():
    train = replace(FP32, zero_stage=0)
    config = Config(train=train, parallel=ParallelConfig(between_nodes="dense"))
    with pytest.raises(ConfigError, match=r"dense needs train.zero_stage 1, 2 or 3, but it is 0"):
        check_together(config.train, config.parallel, deepspeed_config(train, 1))
