"""Every preset, dry: its models fit its name, and the commands of its header would start."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from dalle_dist import storage
from dalle_dist.cli import build_parser
from dalle_dist.config import load, preset_names, to_dict
from dalle_dist.config.presets import preset_text
from dalle_dist.dvae.model import DVAE
from dalle_dist.engine.deepspeed.settings import accumulation, micro_batch
from dalle_dist.errors import ConfigError
from dalle_dist.transformer.model import Transformer

ROOT = Path(__file__).parents[1]
PRESETS = preset_names()
# Parameters in the resblocks' matrices; "1b" is the paper's pilot of up to 1.2 billion.
SIZES = {"1b": 1.2e9, "2.8b": 2.8e9, "5.6b": 5.6e9, "12b": 12.0e9}
STAGES = ["data", "train-dvae", "encode", "tokenizer", "train"]
RANKS = {"torchrun": "--nproc-per-node", "deepspeed": "--num_accelerators"}


class Launch:
    """A command of a preset's header, parsed by the real parser, and the ranks it starts."""

    def __init__(self, line):
        self.line, words = line, shlex.split(line)
        self.ranks, arguments = self._read(words)
        self.options = build_parser().parse_args(arguments)
        self.verb = self.options.verb

    def _read(self, words):
        if words[0] == "sbatch":
            return self._sbatch(words[1:])
        start = next(i for i, word in enumerate(words) if word in ("dalle-dist", "dalle_dist"))
        before, arguments = words[:start], words[start + 1 :]
        if words[0] in RANKS:
            assert before[-1] in ("-m", "--module")
            return int(before[before.index(RANKS[words[0]]) + 1]), arguments
        if words[0] == "srun":
            return int(before[before.index("--ntasks") + 1]), arguments
        assert not before, f"no launcher that is known: {self.line}"
        return 1, arguments

    @staticmethod
    def _sbatch(words):
        at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        flags = dict(zip(words[:at:2], map(int, words[1:at:2]), strict=True))
        assert set(flags) == {"--nodes", "--gpus-per-node", "--ntasks-per-node"}
        assert flags["--gpus-per-node"] == flags["--ntasks-per-node"]
        # The verb that the script would start.
        found = re.search(r'^exec bash .*job\.sh" (\S+)', (ROOT / words[at]).read_text(), re.M)
        ranks = flags["--nodes"] * flags["--ntasks-per-node"]
        return ranks, [found[1], *words[at + 1 :], "--resume", "auto"]


def launches(name):
    header = [line for line in preset_text(name).splitlines() if line.startswith("#")]
    return [Launch(line[1:].strip()) for line in header if line.startswith("#   ")]


def matrices(model):
    return sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)


@pytest.mark.parametrize("name", PRESETS)
def test_models_are_built_without_memory_and_have_the_size_of_the_name(name):
    config = load(name)
    with torch.device("meta"):
        transformer, dvae = Transformer(config), DVAE(config.dvae)
    for model in (transformer, dvae):
        assert all(p.is_meta for p in model.parameters())
    if name in SIZES:
        assert matrices(transformer) == pytest.approx(SIZES[name], rel=0.02)


def test_every_size_in_a_name_is_checked():
    assert {name for name in PRESETS if re.fullmatch(r"[\d.]+b", name)} == set(SIZES)


@pytest.mark.parametrize("name", PRESETS)
def test_the_header_names_all_stages_of_this_preset_in_an_order_that_works(name):
    found = launches(name)
    verbs = [launch.verb for launch in found if launch.verb not in ("report", "plan", "samples")]
    assert verbs == STAGES
    config = load(name)
    for launch in found:
        if launch.verb == "data":
            assert launch.options.out == config.paths.images
        elif launch.verb == "samples":
            assert launch.options.run == config.paths.run
        else:
            assert launch.options.preset == name
            assert load(name, launch.options.overrides).name == name


@pytest.mark.parametrize("name", PRESETS)
def test_batches_divide_by_the_ranks_that_the_header_starts(name):
    config, ranks = load(name), {launch.verb: launch.ranks for launch in launches(name)}
    for stage, verb in ((config.dvae_train, "train-dvae"), (config.train, "train")):
        assert micro_batch(stage, ranks[verb]) * accumulation(stage, ranks[verb]) * ranks[verb] == (
            stage.batch_size
        )


def test_stage_1_of_the_papers_sizes_runs_on_the_papers_64_ranks():
    for name in SIZES:
        assert {launch.verb: launch.ranks for launch in launches(name)}["train-dvae"] == 64


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "rank"),
    [("12b", 64, 3968, 62, 896), ("5.6b", 64, 2688, 42, 640), ("2.8b", 64, 1920, 30, 512)],
)
def test_the_papers_sizes_are_those_of_its_table_1(name, layers, width, heads, rank):
    config = load(name)
    shape = config.transformer
    assert (shape.layers, shape.width, shape.heads, shape.tokens) == (layers, width, heads, 1280)
    assert config.parallel.rank == rank
    assert (config.parallel.between_nodes, config.train.zero_stage) == ("powersgd", 3)
    assert (config.train.precision, config.train.moments) == ("fp16", "16-bit")


def test_a_size_differs_from_12b_in_five_values():
    tree = yaml.safe_load(preset_text("5.6b"))
    assert tree.pop("base") == "12b"
    assert sum(len(v) if isinstance(v, dict) else 1 for v in tree.values()) == 5


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_repeats_what_its_base_says(name):
    tree = yaml.safe_load(preset_text(name))
    below = to_dict(load(tree.pop("base"))) if "base" in tree else None
    if below is not None:
        for section, values in tree.items():
            for key, value in values.items() if isinstance(values, dict) else ():
                assert value != below[section][key], f"{section}.{key}"


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_users_file_may_stand_on_a_preset_or_on_a_file_beside_it(tmp_path):
    write(
        tmp_path,
        mine="base: 5.6b\nname: mine\ntrain: {lr: 1e-3, prompts: [a dog]}\n",
        yours="base: mine.yaml\nname: yours\ntrain: {steps: 7}\n",
    )
    config, below = load(str(tmp_path / "yours.yaml")), load("5.6b")
    assert (config.name, config.train.lr, config.train.steps) == ("yours", 1e-3, 7)
    assert config.train.prompts == ["a dog"]
    assert config.transformer == below.transformer and config.paths == below.paths


def test_deepspeeds_settings_are_replaced_as_a_whole(tmp_path):
    write(
        tmp_path,
        below="train: {deepspeed: {zero_optimization: {reduce_bucket_size: 7}}}\n",
        above="base: below.yaml\ntrain: {deepspeed: {wall_clock_breakdown: true}}\n",
    )
    assert load(str(tmp_path / "above.yaml")).train.deepspeed == {"wall_clock_breakdown": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: other.yaml", "base goes in a circle: .*here.yaml -> .*other.yaml -> .*here.yaml"),
        ("base: here.yaml", "base goes in a circle: .*here.yaml -> .*here.yaml"),
        ("base: emojy", r"here.yaml: base: no preset or file 'emojy'.*did you mean 'emoji'\?"),
        ("base: [12b]", r"here.yaml: base: \['12b'\] is not a preset's name or a file's path"),
    ],
)
def test_a_circle_and_an_unknown_base_are_one_clear_error(tmp_path, text, message):
    write(tmp_path, here=text, other="base: here.yaml")
    with pytest.raises(ConfigError, match=message) as caught:
        load(str(tmp_path / "here.yaml"))
    assert "\n" not in str(caught.value)


def test_a_config_its_bases_and_deepspeeds_settings_may_lie_in_a_store(bucket, tmp_path):
    storage.write_bytes(f"{bucket}/top/above.yaml", b"base: below.yaml\ntrain: {steps: 7}\n")
    below = f"base: {bucket}/root.yaml\ntrain: {{batch_size: 32, deepspeed: {bucket}/ds.json}}\n"
    storage.write_bytes(f"{bucket}/top/below.yaml", below.encode())
    storage.write_bytes(f"{bucket}/root.yaml", b"base: emoji\nseed: 11\n")
    storage.write_bytes(f"{bucket}/ds.json", b'{"wall_clock_breakdown": true}')
    (tmp_path / "here.yaml").write_text(f"base: {bucket}/top/above.yaml\n")
    for source in (f"{bucket}/top/above.yaml", str(tmp_path / "here.yaml")):
        config = load(source)
        assert (config.seed, config.train.steps, config.train.batch_size) == (11, 7, 32)
        assert config.train.deepspeed == {"wall_clock_breakdown": True}


@pytest.mark.parametrize(
    ("above", "message"),
    [
        ("base: gone.yaml", "above.yaml: base: s3://.*/gone.yaml: no such object"),
        ("base: above.yaml", "base goes in a circle: s3://.*above.yaml -> s3://.*above.yaml"),
        ("base: nosuch://b/x.yaml", "above.yaml: base: nosuch://b/x.yaml: unknown scheme"),
        ("base: emoji\ntrain: {deepspeed: 's3://BUCKET/gone.json'}", "^train.deepspeed: s3://"),
    ],
)
def test_what_is_not_in_the_store_is_one_clear_error(bucket, above, message):
    above = above.replace("s3://BUCKET", bucket)
    storage.write_bytes(f"{bucket}/above.yaml", above.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"{bucket}/above.yaml")
    assert "\n" not in str(caught.value)
