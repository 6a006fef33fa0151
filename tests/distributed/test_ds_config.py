import json
from dataclasses import replace
from pathlib import Path

import pytest

from dalle_dist.config import Config, ParallelConfig, TrainConfig
from dalle_dist.engine.deepspeed.settings import accumulation, check_together, deepspeed_config
from dalle_dist.errors import ConfigError

FP32 = TrainConfig(batch_size=16, micro_batch=2, precision="fp32")
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def _with_json(folder, tree, config=FP32):
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return replace(config, deepspeed=str(path))


def test_there_is_one_shipped_file_per_stage_and_it_holds_zero_matters_only():
    assert [path.name for path in SHIPPED] == [f"zero{stage}.json" for stage in range(4)]
    for stage, path in enumerate(SHIPPED):
        tree = json.loads(path.read_text())
        assert list(tree) == ["zero_optimization"]
        assert tree["zero_optimization"]["stage"] == stage


def test_our_values_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found from any folder
    tree = deepspeed_config(replace(FP32, zero_stage=2), 4)
    assert tree["train_batch_size"] == 16
    assert tree["train_micro_batch_size_per_gpu"] == 2
    assert tree["gradient_accumulation_steps"] == 2
    assert tree["gradient_clipping"] == 4.0
    assert (tree["bf16"]["enabled"], tree["fp16"]["enabled"]) == (False, False)
    assert deepspeed_config(replace(FP32, precision="bf16"), 1)["bf16"]["enabled"] is True


def test_the_users_file_goes_before_the_repositorys_and_agreeing_values_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    agreeing = {
        "train_batch_size": "auto",
        "gradient_clipping": 4,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 7},
        "optimizer": {"type": "AdamW", "params": {"lr": 4.5e-4, "betas": [0.9, 0.96]}},
    }
    (tmp_path / "ds_configs" / "zero2.json").write_text(json.dumps(agreeing))
    tree = deepspeed_config(FP32, 1)
    assert tree["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7}
    assert tree["gradient_clipping"] == 4.0
    assert "optimizer" not in tree


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
        ({"scheduler": {"type": "WarmupLR"}}, ("remove 'scheduler'", "train.warmup")),
        ({"amp": {"enabled": True}}, ("remove 'amp'", "train.precision")),
        ({"bf16": True}, ("bf16",)),
        ({"zero_optimization": {"stage": 4}}, ("stage", "4")),
        ("{", ("not JSON",)),
        ("[1]", ("not a JSON object",)),
    ],
)
def test_a_contradiction_is_refused_in_one_line_with_key_and_both_values(tmp_path, tree, parts):
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(_with_json(tmp_path, tree), 2)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*parts, "ds.json"):
        assert part in message


def test_a_missing_file_and_a_batch_that_cannot_be_split_are_refused():
    with pytest.raises(ConfigError, match=r"train.deepspeed: no file 'nowhere.json'"):
        deepspeed_config(replace(FP32, deepspeed="nowhere.json"), 1)
    assert accumulation(FP32, 4) == 2
    for world in (3, 16):
        with pytest.raises(ConfigError, match=r"train.batch_size: 16 is not a multiple"):
            accumulation(FP32, world)


def test_deepspeeds_own_fp16_is_refused_under_ours(tmp_path):
    fp16, zero = replace(FP32, precision="fp16"), {"zero_optimization": {"stage": 2}}
    for section in ({"enabled": True}, {"enabled": "auto"}, {"loss_scale": 0}):
        with pytest.raises(ConfigError, match=r"remove 'fp16': train.precision=fp16 has"):
            deepspeed_config(_with_json(tmp_path, zero | {"fp16": section}, fp16), 1)
    tree = deepspeed_config(_with_json(tmp_path, zero | {"fp16": {"enabled": False}}, fp16), 1)
    assert tree["fp16"] == {"enabled": False}


def test_micro_batches_are_summed_in_fp32_unless_the_json_says_otherwise(tmp_path):
    bf16, zero = replace(FP32, precision="bf16"), {"zero_optimization": {"stage": 2}}
    for section in ({}, {"data_types": {}}, {"data_types": {"grad_accum_dtype": "fp32"}}):
        tree = deepspeed_config(_with_json(tmp_path, zero | section, bf16), 1)
        assert tree["data_types"] == {"grad_accum_dtype": "fp32"}
    train = _with_json(tmp_path, zero | {"data_types": {"grad_accum_dtype": "bf16"}}, bf16)
    tree = deepspeed_config(train, 1)
    assert tree["data_types"] == {"grad_accum_dtype": "bf16"}
    check_together(Config(train=train), tree)
    for between in ("dense", "powersgd"):
        with pytest.raises(ConfigError, match=r"remove data_types.grad_accum_dtype \(bf16\)"):
            check_together(
                Config(train=train, parallel=ParallelConfig(between_nodes=between)), tree
            )
