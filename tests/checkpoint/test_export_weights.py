"""Weights of checkpoints as torch's and transformers' files, and the list of all exports."""

import inspect
import json
from dataclasses import replace
from pkgutil import resolve_name

import exported
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.export import registry
from dalle_dist.checkpoint.export.training_state import groups_of
from dalle_dist.checkpoint.formats import INDEX
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.save import Saver
from dalle_dist.config import from_dict, to_dict
from dalle_dist.distributed import process_group
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.gradients.piece import Piece
from dalle_dist.stages import STAGES
from dalle_dist.transformer.blocks import resblock_map
from dalle_dist.transformer.model import Transformer
from tests.engine import test_fp16 as fp16

NAMES = ("torch", "transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a transformer with random weights and another average; its manifest."""
    ranks, folder = process_group.init(), tmp_path_factory.mktemp("saved")
    config = fp16.config_of(0)
    state = Transformer(config).state_dict()
    kinds = {
        kind: [Piece(name, 0, torch.randn(tensor.numel())) for name, tensor in state.items()]
        for kind in ("weights", "average")
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    training = {"stage": "transformer", "shapes": shapes, "optimizer_steps": 3}
    saver = Saver(str(folder), ranks, folder / "scratch", 1)
    saver.save(Manifest(3, {}, {}, training, to_dict(config)), kinds)
    saver.wait()
    process_group.shutdown()
    path = store.step_folder(str(folder), 3)
    return path, read_manifest(path)


def write(name, saved, out, **options):
    return registry.export_function(name)(*saved, str(out), **options)


@pytest.mark.parametrize(("weights", "kind"), [("ema", "average"), ("raw", "weights")])
def test_a_file_of_torch_is_a_dict_of_tensors(saved, weights, kind, tmp_path):
    out = tmp_path / "model.pt"
    assert write("torch", saved, out, weights=weights) == [str(out)]
    state = torch.load(out, weights_only=True)
    assert type(state) is dict
    assert exported.same(state, exported.whole(saved[0], kind))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_rounded_to_the_wanted_dtype(saved, name, tmp_path):
    out = tmp_path / "out.pt"
    write(name, saved, out, dtype=torch.bfloat16)
    state = torch.load(out) if name == "torch" else load_file(out / "model.safetensors")
    for key, values in exported.whole(saved[0], "average").items():
        assert torch.equal(state[key], torch.from_numpy(values).bfloat16())
    if name == "transformers":
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


class _Config(PretrainedConfig):
    model_type = "dalle-dist-transformer"


class _Model(PreTrainedModel):
    """As a user of the folder writes it."""

    config_class = _Config

    def __init__(self, config):
        super().__init__(config)
        sections = {name: getattr(config, name) for name in ("transformer", "tokenizer")}
        inner = Transformer(from_dict({**to_dict(fp16.config_of(0)), **sections}))
        for name, module in inner.named_children():
            self.add_module(name, module)
        for name, parameter in inner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.post_init()

    def _init_weights(self, module):
        pass


def test_a_class_of_transformers_is_filled_from_its_folder(saved, tmp_path):
    files = write("transformers", saved, tmp_path, weights="raw")
    assert files == [str(tmp_path / "model.safetensors"), str(tmp_path / "config.json")]
    model, notes = _Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] | notes["unexpected_keys"] | notes["mismatched_keys"]
    assert exported.same(model.state_dict(), exported.whole(saved[0], "weights"))
    with pytest.raises(ValueError, match="dalle-dist-transformer"):
        AutoModel.from_pretrained(tmp_path)


def test_large_models_have_an_index(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_dist.checkpoint.formats.LARGEST_FILE", 100_000)
    files = write("transformers", saved, tmp_path)
    assert len(files) > 3
    assert files[-2] == f"{tmp_path}/model.safetensors{INDEX}"
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(files)
    model = _Model.from_pretrained(tmp_path)
    assert exported.same(model.state_dict(), exported.whole(saved[0], "average"))


def test_a_clip_is_sent_to_its_release(saved, tmp_path):
    path, manifest = saved
    clip = replace(manifest, training={**manifest.training, "stage": "clip"})
    with pytest.raises(ConfigError, match="convert it to a release"):
        write("transformers", (path, clip), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_over(saved, name, tmp_path):
    write(name, saved, tmp_path / "out.pt")
    with pytest.raises(CheckpointError, match="choose another folder"):
        write(name, saved, tmp_path / "out.pt")


def test_a_file_of_torch_is_called_one(saved, tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.pt"):
        write("torch", saved, tmp_path / "model.bin")


def test_groups_are_those_of_the_engine(saved):
    with torch.device("meta"):
        matrices = resblock_map(Transformer(fp16.config_of(0))).matrices
    inside, outside = groups_of(*saved)
    assert set(inside.shapes) == set(matrices)
    assert inside.shapes.keys() | outside.shapes.keys() == saved[1].training["shapes"].keys()
    decays = inside.options["weight_decay"], outside.options["weight_decay"]
    assert decays == (fp16.config_of(0).train.weight_decay, 0.0)


def test_every_stage_names_its_decayed_parameters_and_settings():
    config = fp16.config_of(0)
    sections = {name: entry.section for name, entry in STAGES.items()}
    assert sections == {"dvae": "dvae_train", "transformer": "train", "clip": "clip_train"}
    for entry in STAGES.values():
        assert getattr(config, entry.section).section == entry.section
        with torch.device("meta"):
            model = resolve_name(entry.model)(config)
        names = resolve_name(entry.decayed)(model)
        assert 0 < len(names) <= len(list(model.named_parameters()))
        assert set(names) <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", registry.EXPORTS)
def test_options_are_arguments_of_the_writer(name):
    arguments = inspect.signature(registry.export_function(name)).parameters
    assert list(arguments)[:3] == ["checkpoint", "manifest", "out"]
    assert set(registry.EXPORTS[name].options) <= set(arguments)


def test_an_unknown_export_is_refused():
    with pytest.raises(ConfigError, match="'onnx' is not one of deepspeed"):
        registry.export_function("onnx")
