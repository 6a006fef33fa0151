import dataclasses

import pytest
import yaml

from dalle_dist import config as configs
from dalle_dist.config import (
    Config,
    DVAETrainConfig,
    StageConfig,
    TrainConfig,
    TransformerConfig,
    difference,
    from_dict,
    load,
    to_dict,
    to_yaml,
)
from dalle_dist.config.root import keys_of, section_names
from dalle_dist.errors import ConfigError

PRESETS = ["12b", "1b", "2.8b", "5.6b", "cc3m", "emoji", "emoji-gpu", "emoji-image-to-image"]


def test_presets_are_the_seven_promised_ones():
    assert configs.preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads_and_survives_yaml(name):
    config = load(name)
    assert config.name == name
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_12b_has_the_papers_numbers():
    config = load("12b")
    t, train, stage1 = config.transformer, config.train, config.dvae_train
    assert (t.layers, t.width, t.heads, t.tokens) == (64, 3968, 62, 1280)
    assert (train.batch_size, train.steps, train.lr, train.clip) == (1024, 430_000, 4.5e-4, 4.0)
    assert (train.beta1, train.beta2, train.weight_decay) == (0.9, 0.96, 4.5e-2)
    assert (train.ema, train.ema_every, train.text_loss) == (0.99, 25, 0.125)
    assert (stage1.kl_weight, stage1.kl_steps, stage1.temperature_final) == (6.6, 5000, 0.0625)
    assert (stage1.lr, stage1.lr_final, stage1.lr_steps) == (1e-4, 1.25e-6, 1_200_000)


def test_overrides_convert_types():
    config = load("emoji", ["train.steps=7", "train.lr=3e-4", "train.prompts=[a, b]", "seed=2"])
    assert (config.train.steps, config.train.lr, config.seed) == (7, 3e-4, 2)
    assert config.train.prompts == ["a", "b"]
    assert load("emoji", ["train.text_loss=1/4"]).train.text_loss == 0.25


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=7", r"unknown key 'train.stesp'; did you mean 'steps'\?"),
        ("trian.steps=7", r"unknown key 'trian'; did you mean 'train'\?"),
        ("train.steps=many", "train.steps: 'many' is not an integer"),
        ("train.steps=1.5", "train.steps: 1.5 is not an integer"),
        ("train.steps=true", "train.steps: True is not an integer"),
        ("train.lr=1/0", "train.lr: '1/0' is not a number"),
        ("train.prompts=7", "train.prompts: 7 is not a list"),
        ("train.prompts=[7]", r"train.prompts\[0\]: 7 is not text"),
        ("train.checkpoint_activations=1", "train.checkpoint_activations: 1 is not true or false"),
        ("train.precision=fp8", "train.precision: 'fp8' is not one of auto, fp16, bf16, fp32"),
        ("train=7", "train: 7 is not a section with keys"),
        ("train.steps", "'train.steps' is not of the form key=value"),
        ("train.lr.x=1", "train.lr.x: 'lr' is not a section"),
        ("transformer.heads=5", "transformer.width: 192 is not transformer.heads x 64 = 320"),
        ("transformer.image_grid=9", "transformer.image_grid: 9, but the dVAE gives"),
        ("dvae.image_size=70", "dvae.image_size: 70 is not a multiple"),
        ("dvae.codebook_size=70000", "dvae.codebook_size: 70000 is not at least 2, at most 65,536"),
        ("transformer.conv_kernel=4", "transformer.conv_kernel: 4 is not odd"),
        ("train.micro_batch=7", "train.batch_size: 16 is not a multiple of train.micro_batch 7"),
        ("train.ema=1", r"train.ema: 1.0 is not at least 0, below 1"),
        ("tokenizer.bpe_dropout=1", r"tokenizer.bpe_dropout: 1.0 is not at least 0, below 1"),
        ("train.steps=0", "train.steps: 0 is not at least 1"),
        ("dvae_train.crop_min=0.5", r"dvae_train.crop_min: 0.5 is not at least 1"),
    ],
)
def test_what_a_user_gets_wrong_is_named(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load("emoji", [override])
    assert "\n" not in str(caught.value)


def test_file_that_is_no_config(tmp_path):
    broken, listed = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("train: [")
    listed.write_text("- 1")
    with pytest.raises(ConfigError, match="not YAML"):
        load(str(broken))
    with pytest.raises(ConfigError, match="not a mapping"):
        load(str(listed))
    with pytest.raises(ConfigError, match=r"no preset or file 'emojy'.*did you mean 'emoji'\?"):
        load("emojy")


def test_difference_names_every_leaf_that_differs():
    ours, theirs = to_dict(load("emoji")), to_dict(load("emoji", ["seed=3", "train.lr=1"]))
    assert difference(ours, theirs) == ["seed: 0 -> 3", f"train.lr: {ours['train']['lr']} -> 1.0"]
    assert difference({"a": 1}, {"b": 1}) == ["a: 1 -> (absent)", "b: (absent) -> 1"]


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


KEYS = [
    (f"{section}.{name}".lstrip("."), kind, meaning)
    for section, owner in {"": Config, **section_names()}.items()
    for name, kind, meaning in keys_of(owner)
]
NUMBERS = [(key, kind, meaning) for key, kind, meaning in KEYS if kind in (int, float, list[int])]


def outside(kind, meaning):
    """A value just outside of each bound, and those that are no finite number."""
    step = 1e-3 if kind is float else 1
    if meaning.at_least is not None:
        yield meaning.at_least - step
    if meaning.above is not None:
        yield meaning.above
    if meaning.at_most is not None:
        yield meaning.at_most + step
    if meaning.below is not None:
        yield meaning.below
    yield from (".nan", ".inf", "-.inf")


@pytest.mark.parametrize(("key", "kind", "meaning"), KEYS, ids=[key for key, *_ in KEYS])
def test_every_key_says_what_it_means_and_where_it_is_from(key, kind, meaning):
    assert len(meaning.description) >= 5 and meaning.source
    if kind in (int, float):
        assert meaning.at_least is not None or meaning.above is not None, "no lower bound"


@pytest.mark.parametrize(("key", "kind", "meaning"), NUMBERS, ids=[key for key, *_ in NUMBERS])
def test_every_bound_of_every_number_is_enforced_with_its_key(key, kind, meaning):
    for value in outside(kind, meaning):
        text = f"[{value}]" if kind == list[int] else value
        with pytest.raises(ConfigError) as caught:
            load("emoji", [f"{key}={text}"])
        assert str(caught.value).startswith((f"{key}: ", f"{key}[0]: ")), str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": TrainConfig(lr=float("nan"))}, "train.lr: nan is not a finite number"),
        ({"train": TrainConfig(precision="fp8")}, "train.precision: 'fp8' is not one of"),
        ({"train": TrainConfig(zero_stage=True)}, "train.zero_stage: True is not one of 0, 1"),
        ({"train": TrainConfig(halve_at=[0])}, r"train.halve_at\[0\]: 0 is not at least 1"),
        ({"seed": -1}, "seed: -1 is not at least 0"),
        ({"name": ""}, "name: the text is empty"),
    ],
)
def test_a_config_made_in_python_is_checked_alike(section, message):
    with pytest.raises(ConfigError, match=message):
        Config(**section)


def test_an_image_tokenizer_of_another_kind_is_not_held_to_the_dvae():
    other = ["transformer.codebook_size=99", "transformer.image_grid=5"]
    assert load("emoji", ["image_tokenizer.kind=vqgan", *other]).transformer.codebook_size == 99
    with pytest.raises(ConfigError, match=r"transformer.image_grid: 5, but the dVAE gives 8"):
        load("emoji", other)
    with pytest.raises(ConfigError, match=r"codebook_size: 99 is not dvae.codebook_size 256"):
        load("emoji", other[:1])
    assert TransformerConfig().codebook_size == 8192


def test_micro_batch_zero_goes_with_any_batch_in_both_stages():
    config = load("emoji", ["train.micro_batch=0", "dvae_train.micro_batch=0"])
    assert (config.train.micro_batch, config.dvae_train.micro_batch) == (0, 0)
    with pytest.raises(ConfigError, match=r"dvae_train.batch_size: 32 is not a multiple of dvae_t"):
        load("emoji", ["dvae_train.micro_batch=5"])


def test_both_stages_share_their_fields_and_each_has_its_defaults():
    shared = {entry.name for entry in dataclasses.fields(StageConfig)}
    assert {"steps", "micro_batch", "ema_every", "zero_stage", "deepspeed", "wandb"} <= shared
    for stage in (TrainConfig, DVAETrainConfig):
        assert issubclass(stage, StageConfig) and shared <= {
            f.name for f in dataclasses.fields(stage)
        }
        assert getattr(Config(), stage.section) == stage()
    one, two = DVAETrainConfig(), DVAETrainConfig()
    assert (one.micro_batch, one.ema_every, one.zero_stage, one.sample_every) == (0, 1, 0, 5_000)
    assert one.deepspeed == {} and one.deepspeed is not two.deepspeed


def test_each_choice_of_the_config_is_known_to_the_code_that_obeys_it():
    from dalle_kernels.masks import variants

    from dalle_dist import choices
    from dalle_dist.generate.sampling_options import SCHEDULES
    from dalle_dist.gradients.all_reduce import _DTYPES
    from dalle_dist.optim.adamw import MOMENTS

    assert set(choices.values(choices.MaskVariant)) == set(variants())
    assert set(choices.values(choices.Moments)) == set(MOMENTS)
    assert set(choices.values(choices.GuidanceSchedule)) == set(SCHEDULES)
    assert set(choices.values(choices.CommDtype)) - set(_DTYPES) == {"1-6-9"}
