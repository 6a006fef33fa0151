"""Checkpoints of every ZeRO stage, written by two ranks, to release folders in one process."""

from pathlib import Path

import checkpointed
import numpy as np
import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from dalle_dist.checkpoint.convert import convert, find_checkpoint
from dalle_dist.checkpoint.formats import load_tensors, read_notes
from dalle_dist.checkpoint.release import load_release
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.optim.ema import EMA
from dalle_dist.optim.plateau_schedule import PlateauSchedule
from dalle_dist.testing import run_distributed
from dalle_dist.text_tokenizer.bpe import Tokenizer
from dalle_dist.train.data import Progress
from dalle_dist.train.state import Identity, TrainingState
from dalle_dist.transformer.model import Transformer

STAGES = (0, 1, 2, 3)


def _present(engine, config):
    with engine.sampling_model(lambda: Transformer(config)) as model:
        state = {} if model is None else model.state_dict()
        return {name: tensor.float().numpy().copy() for name, tensor in state.items()}


def _checkpoint(ranks, folder, stage):
    """Two updates, each taken into the average, and a checkpoint; weights gathered by the way."""
    config = tiny_run.make(folder, zero_stage=stage, ema=0.5)
    torch.manual_seed(0)
    engine = build_engine(Transformer(config), config.train, ranks)
    schedule, ema = PlateauSchedule(config.train), EMA(config.train.ema)
    identity = Identity("transformer", config, config.train, config.train.precision)
    state = TrainingState(identity, ranks, engine, ema, schedule, Progress(0, {}, 1))
    generator = torch.Generator().manual_seed(ranks.rank)
    gathered = []
    for _ in range(2):
        for _ in range(engine.accumulation):
            text_BT = torch.randint(0, 300, (2, 8), generator=generator)
            codes_BN = torch.randint(0, 16, (2, 16), generator=generator)
            engine.backward(engine(text_BT, codes_BN).total(0.5))
        engine.step(1e-2)
        state.step += 1
        state.ema.update(engine.weights())
        gathered.append(_present(engine, config))
    return checkpointed.save_state(state, folder / f"zero{stage}" / "checkpoints"), gathered


def _checkpoints(ranks, folder):
    if ranks.rank == 0:
        tiny_run.make(folder)
    ranks.barrier()
    return [_checkpoint(ranks, folder, stage) for stage in STAGES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return run_distributed(_checkpoints, 2, tmp_path_factory.mktemp("saved"))[0]


@pytest.mark.parametrize("stage", STAGES)
def test_release_holds_the_gathered_weights_of_each_stage(saved, stage, tmp_path):
    path, (_, last) = saved[stage]
    convert(str(path), str(tmp_path / "raw"), "raw")
    state = load_tensors(tmp_path / "raw" / "transformer.safetensors")
    assert state.keys() == last.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), last[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_release_holds_the_average_and_can_be_used(saved, stage, tmp_path):
    path, (first, last) = saved[stage]
    # The run folder, the folder of checkpoints and the checkpoint itself mean the same.
    path = Path(path)
    digests = {convert(str(p), str(tmp_path / p.name)) for p in (path, *list(path.parents)[:2])}
    release = load_release(str(tmp_path / path.name))
    assert digests == {release.fingerprint}
    share = 1 / 10  # of the first weights, when the second come in
    for name, tensor in release.transformer.state_dict().items():
        expected = share * first[name] + (1 - share) * last[name]
        assert np.allclose(tensor.numpy(), expected, rtol=0, atol=1e-6), name
    assert not np.allclose(first["norm.weight"], last["norm.weight"])
    wanted = Tokenizer.load(str(path.parents[2] / "tokenizer")).fingerprint
    assert release.tokenizer.fingerprint == wanted


@pytest.mark.parametrize(
    ("key", "other"), [("mask_variant: paper", "clamp"), ("masks: paper", "causal")]
)
def test_weights_are_not_used_under_other_masks(saved, tmp_path, key, other):
    """No tensor's shape would tell; the images would only be worse."""
    out = tmp_path / "release"
    convert(str(saved[1][0]), str(out))
    text = (out / "config.yaml").read_text()
    assert key in text
    name = key.partition(":")[0]
    (out / "config.yaml").write_text(text.replace(key, f"{name}: {other}"))
    with pytest.raises(
        CheckpointError, match=f"other masks .*transformer.{name}: paper -> {other}"
    ):
        load_release(str(out))


def test_notes_of_others_do_not_matter_and_absent_ones_are_said(saved, tmp_path):
    out = tmp_path / "release"
    convert(str(saved[1][0]), str(out))
    path = out / "transformer.safetensors"
    state, notes = load_file(path), read_notes(path)
    save_file(state, path, notes | {"format": "pt"})
    assert load_release(str(out)).fingerprint
    save_file(state, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="does not say under which masks"):
        load_release(str(out))


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(saved, tmp_path):
    path, _ = saved[1]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("name: mine\n")
    with pytest.raises(CheckpointError, match="holds a release already"):
        convert(str(path), str(tmp_path / "used"))
    assert (tmp_path / "used" / "config.yaml").read_text() == "name: mine\n"
    with pytest.raises(ConfigError, match="'best' is not one of ema, raw"):
        convert(str(path), str(tmp_path / "out"), "best")
    with pytest.raises(CheckpointError, match="no whole checkpoint here"):
        find_checkpoint(str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused_by_name_of_the_file(saved, tmp_path):
    path, _ = saved[2]
    victim = Path(path) / "weights-rank-00001.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=r"weights-rank-00001.safetensors is damaged"):
            convert(str(path), str(tmp_path / "out"), "raw")
    finally:
        victim.write_bytes(whole)
    assert not (tmp_path / "out").exists()
