"""The 12B run in small, `make rehearse`: every option of the preset, killed, resumed, released."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import rehearsal
from PIL import Image

from dalle_dist.cli import main
from dalle_dist.testing import run_distributed
from dalle_dist.train.run import read_log
from dalle_dist.train.transformer import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rehearsal")


def losses(config):
    return np.array([line["loss"] for line in read_log(config.paths.run) if "loss" in line])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_trained_drawn_saved_killed_and_gone_on_with_on_other_nodes(folder, precision):
    config = rehearsal.config_of(
        folder, f"whole-{precision}", f"train.precision={precision}", "train.sample_every=5",
        "parallel.local_world_size=2", f"train.checkpoint_activations={precision == 'fp16'}",
    )  # fmt: skip
    run = Path(config.paths.run)
    process = rehearsal.start(config, 4, folder)
    rehearsal.kill_after(process, run / "checkpoints" / "step-00000005")
    said = rehearsal.finish(config, 2, folder, resume=True)  # one node instead of two
    assert "PowerSGD at rank 8 per shard leaves out" in said
    assert "restored step 5" in said and "translated: " in said and "nodes" in said
    log = losses(config)
    assert len(log) == 10 and np.isfinite(log).all() and log[-4:].mean() < log[:4].mean() - 0.1
    lines = read_log(run)
    assert [line["step"] for line in lines if "held_out_image" in line] == [10]
    (last,) = [line["compression_error"] for line in lines if line["step"] == 5 and "lr" in line]
    assert len(last) == 4 * 64 and all(0 < error < 1 for error in last)  # of two nodes
    for step in (5, 10):
        assert Image.open(run / "samples" / f"step-{step:08d}-samples.png").width > 64
    out = folder / f"generated-{precision}"
    assert main(["generate", str(run / "release"), "red heart", "-o", str(out)]) == 0
    assert np.asarray(Image.open(out / "grid.png")).std() > 0


def test_samples_beside_the_run_are_those_of_its_release(folder, capsys):
    run = folder / "whole-fp16"
    assert main(["samples", str(run), "--follow", "--precision", "fp32"]) == 0
    path = capsys.readouterr().out.split()[-1]
    assert path == str(run / "samples" / "step-00000010-samples.png")
    assert Image.open(path).width > 64


# In the preset's precision with all its layers; 64 take minutes, most of them in hooks of ZeRO-3.
LAYERS = {"fp16": 64, "bf16": 16}


def _train(ranks, config):
    # For loader processes: that of the process which forked this one would pickle the data set.
    multiprocessing.set_start_method("fork", force=True)
    train(config)


def test_two_by_two_four_by_one_and_one_process_agree(folder):
    """Where nothing is compressed: whole means between nodes, in both precisions' own rounding."""
    found = {}
    for precision, layers in LAYERS.items():
        for name, ranks, overrides in (
            ("2x2", 4, ["parallel.local_world_size=2", "parallel.start_step=100"]),
            ("4x1", 4, ["parallel.local_world_size=1", "parallel.start_step=100"]),
            ("1x1", 1, ["parallel.local_world_size=1", "parallel.between_nodes=dense"]),
        ):
            config = rehearsal.config_of(
                folder, f"{name}-{precision}", f"train.precision={precision}",
                f"transformer.layers={layers}", "train.steps=20", "train.eval_every=20", *overrides,
            )  # fmt: skip
            run_distributed(_train, ranks, config, timeout=600)
            found[precision, name] = losses(config)
    for precision in LAYERS:
        alone = found[precision, "1x1"]
        assert len(alone) == 20 and alone[-1] < alone[0] - 0.1
        for name in ("2x2", "4x1"):
            np.testing.assert_allclose(found[precision, name], alone, rtol=1e-3)
