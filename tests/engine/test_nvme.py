"""ZeRO-3 with the optimizer's state on NVMe: trains, saves and resumes as without offload."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import tiny_run
import torch
from light_async_io import compile_light
from safetensors.torch import load_file

from dalle_dist.checkpoint.save import Staging
from dalle_dist.config import from_dict, load
from dalle_dist.engine.deepspeed.async_io import require_async_io
from dalle_dist.engine.deepspeed.nvme import swapped
from dalle_dist.engine.deepspeed.nvme_settings import check_nvme, claim_folder
from dalle_dist.engine.deepspeed.settings import deepspeed_config
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.gradients.piece import Piece
from dalle_dist.testing import run_distributed
from dalle_dist.train.run import read_log
from dalle_dist.train.transformer import train
from dalle_dist.transformer.loss_model import LossTransformer

FILE = Path(__file__).parents[2] / "ds_configs" / "zero3_offload_nvme.json"
KEYS = json.loads(FILE.read_text())
# Wide enough for sub-groups of more than 1 MiB on each of two ranks: DeepSpeed keeps others.
WIDE = ("transformer.width=256", "transformer.heads=4")

MICRO_BATCHES = 2  # of a step of tiny_run on each of two ranks


def keys_on(folder, **offload):
    """The shipped keys, with a folder that is there."""
    keys = json.loads(json.dumps(KEYS))
    keys["zero_optimization"]["offload_optimizer"] |= {"nvme_path": str(folder)} | offload
    return keys


def libaio():
    """Why the extension cannot be compiled, or ""."""
    if os.geteuid() == 0 and shutil.which("apt-get") and not Path("/usr/include/libaio.h").exists():
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "libaio-dev"]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True)
    try:
        require_async_io("train", keys_on(tempfile.gettempdir()))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def async_io():
    """The extension, compiled at the first test on a machine; in CI it must."""
    with pytest.MonkeyPatch.context() as patch:
        compile_light(patch)
        reason = libaio()
    if reason and os.environ.get("CI"):
        pytest.fail(f"in CI NVMe must be tested: {reason}")
    if reason:
        pytest.skip(reason)


def on_nvme(folder):
    """A copy of the shipped file with small sub-groups, and a folder that is there."""
    keys = keys_on(folder)
    keys["zero_optimization"]["sub_group_size"] = 400_000
    file = folder / "nvme.json"
    file.write_text(json.dumps(keys))
    return f"train.deepspeed={file}"


def configured(folder, *overrides, **settings):
    folder.mkdir(exist_ok=True)
    short = {"eval_every": 4, "save_every": 2, "prompts": [], "zero_stage": 3} | settings
    path = tiny_run.write_config(tiny_run.make(folder, **short), folder / "config.yaml")
    return load(path, [*WIDE, *overrides])


def _train(ranks, config, resume):
    import dalle_dist.engine.deepspeed.engine as module

    compile_light(pytest.MonkeyPatch())
    counts, made = [], module.DeepSpeedEngine.__init__

    def counted(self, engine, *args, **kwargs):
        made(self, engine, *args, **kwargs)
        counts.append(len(swapped(engine.optimizer)))

    module.DeepSpeedEngine.__init__ = counted
    train(config, resume)
    return counts[-1]


def _train_spoiled(ranks, config, resume):
    """Of rank 1 the gradients of step 2 are no numbers, and in step 3 the loss alone is none."""
    forward, done = LossTransformer.forward, 0

    def spoiled(self, *inputs):
        nonlocal done
        found = forward(self, *inputs)
        if not self.training or ranks.rank == 0:
            return found
        step, done = done // MICRO_BATCHES + 1, done + 1
        return found * torch.nan if step == 2 else found + torch.nan if step == 3 else found

    LossTransformer.forward = spoiled
    return _train(ranks, config, resume)


def losses(ranks, config, resume=None, train=_train):
    """Of a run, and how many sub-groups of each rank were on NVMe."""
    counts = run_distributed(train, ranks, config, resume, timeout=240)
    logged = [line["loss"] for line in read_log(config.paths.run) if "loss" in line]
    return [math.nan if loss is None else loss for loss in logged], counts  # of skipped steps


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_it_trains_and_resumes_as_without_offload(async_io, tmp_path, ranks, precision):
    disk = tmp_path / "disk"
    disk.mkdir()
    plain, none = losses(ranks, configured(tmp_path / "plain", steps=4, precision=precision))
    assert none == [0] * ranks and len(plain) == 4
    found, counts = losses(
        ranks, configured(tmp_path / "nvme", on_nvme(disk), steps=2, precision=precision)
    )
    assert min(counts) > 1
    assert found == pytest.approx(plain[:2], rel=1e-6)
    again = configured(tmp_path / "nvme", on_nvme(disk), steps=4, precision=precision)
    found, _ = losses(ranks, again, "auto")
    assert found == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_skipped_steps_leave_what_they_leave_without_offload(async_io, tmp_path):
    wider = ("transformer.width=512", "transformer.heads=8")  # gradients of 1 MiB go to files too
    disk = tmp_path / "disk"
    disk.mkdir()
    configs = [
        configured(tmp_path / name, *keys, *wider, steps=5, save_every=5)
        for name, keys in (("plain", []), ("nvme", [on_nvme(disk)]))
    ]
    (plain, _), (found, counts) = (losses(2, config, train=_train_spoiled) for config in configs)
    assert min(counts) > 1
    assert [math.isnan(loss) for loss in plain] == [False, True, True, False, False]
    assert found == pytest.approx(plain, rel=1e-6, nan_ok=True)
    saved, same = (Path(config.paths.run) / "checkpoints" / "step-00000005" for config in configs)
    files = sorted(saved.glob("*.safetensors"))
    assert len(files) > 6
    for file in files:
        torch.testing.assert_close(load_file(same / file.name), load_file(file))


SETTINGS = from_dict({"train": {"zero_stage": 3, "moments": "fp32", "precision": "fp32"}}).train


@pytest.mark.parametrize(
    ("settings", "offload", "named"),
    [
        ({"zero_stage": 2}, {}, "train.zero_stage 3"),
        ({"moments": "16-bit"}, {}, "train.moments fp32"),
        ({}, {"pipeline_read": True}, "remove zero_optimization.offload_optimizer.pipeline_read"),
    ],
)
def test_what_is_not_tested_is_refused(settings, offload, named):
    with pytest.raises(ConfigError, match=named):
        check_nvme(dataclasses.replace(SETTINGS, **settings), keys_on("/", **offload))


def test_parameters_on_nvme_are_refused():
    keys = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    settings = dataclasses.replace(SETTINGS, deepspeed=keys, batch_size=1)
    with pytest.raises(ConfigError, match="nvme is not supported; say cpu"):
        deepspeed_config(settings, 1)


def test_a_folder_that_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="missing' is no folder that can be written to"):
        require_async_io("train", keys_on(tmp_path / "missing"))


def test_a_failed_compilation_is_one_line_and_a_lock_left_behind_goes(
    tmp_path, monkeypatch, capsys
):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def fail(self, verbose):
        raise RuntimeError("Error building extension 'async_io'\nmuch more")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(AsyncIOBuilder, "load", fail)
    left = tmp_path / "async_io" / "lock"
    left.parent.mkdir()
    left.touch()
    with pytest.raises(ConfigError, match="install libaio-dev") as caught:
        require_async_io("train", keys_on(tmp_path))
    assert "Error building" in str(caught.value) and "\n" not in str(caught.value)
    assert "is being compiled" in capsys.readouterr().out
    assert not left.exists()


def test_gpus_without_the_cuda_toolkit_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(ConfigError, match="no CUDA toolkit is found"):
        require_async_io("train", keys_on(tmp_path))


def test_an_untested_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("deepspeed.__version__", "0.18.9")
    with pytest.raises(ConfigError, match="install that, or offload to cpu"):
        require_async_io("train", keys_on(tmp_path))


def test_folders_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    mine = claim_folder(keys_on(tmp_path))
    dead, foreign = tmp_path / f"dalle-dist-{os.getuid()}-dead", tmp_path / "dalle-dist-others"
    dead.mkdir()
    foreign.mkdir()
    other = claim_folder(keys_on(tmp_path))
    assert mine.is_dir() and other.is_dir() and mine != other
    assert foreign.is_dir() and not dead.exists()


def test_where_there_are_no_locks_no_folder_goes(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    folders = [claim_folder(keys_on(tmp_path)) for _ in range(3)]
    assert len({folder for folder in folders if folder.is_dir()}) == 3


def test_copies_for_a_checkpoint_are_mapped_files(tmp_path):
    values = torch.arange(6.0)
    copy = Staging(values.device, tmp_path).copy({"weights": [Piece("a", 0, values)]})
    values.zero_()
    assert copy["weights"]["a@0"].tolist() == [0, 1, 2, 3, 4, 5]
    assert f"{tmp_path}/copy-" in Path("/proc/self/maps").read_text()
    assert not list(tmp_path.iterdir())


def test_a_copy_without_room_is_one_line(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"no room for 24 bytes .*No space left"):
        Staging(torch.device("cpu"), tmp_path).copy({"weights": [Piece("a", 0, torch.ones(6))]})
    assert not list(tmp_path.iterdir())
