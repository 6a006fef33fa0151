"""Plots of what a real run logs: fp16 with scales, PowerSGD between two nodes of one rank."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from dalle_dist.cli import main
from dalle_dist.distributed import process_group
from dalle_dist.errors import DataError
from dalle_dist.report.plots import _compression, plot
from dalle_dist.testing import run_distributed
from dalle_dist.train.run import Run, read_log
from dalle_dist.train.transformer import train
from tests.tiny_run import make

FP16 = {"precision": "fp16", "moments": "16-bit", "zero_stage": 2}
POWERSGD = {"between_nodes": "powersgd", "local_world_size": 1, "rank_of": "shard", "rank": 8}


def trained(ranks, folder):
    config = make(folder, parallel=POWERSGD, **FP16)
    train(config)
    return config.paths.run


def gone_on_with(ranks, folder):
    config = make(folder, parallel=POWERSGD, **(FP16 | {"steps": 9}))
    train(config, "auto")
    return [line for line in read_log(folder / "run") if "loss" in line]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """On two nodes; then a copy of its line of log, gone on with on one."""
    folder = tmp_path_factory.mktemp("plots")
    make(folder)
    return folder, run_distributed(trained, 2, folder)[0]


def test_the_log_has_a_number_for_each_resblock_and_matrix(run):
    folder, _ = run
    lines = [line for line in read_log(folder / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert len(line["scale"]) == len(line["overflows"]) == len(line["underflow"]) == 4
        assert len(line["compression_error"]) == 8
        assert 0 < line["sent_megabytes"] < line["dense_megabytes"]
    assert lines[5]["scale"][0] > lines[0]["scale"][0] > 2 * 2**13
    assert lines[5]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("what", ["scales", "compression"])
def test_plots_are_pictures_with_lines_in_them(run, what, capsys):
    _, path = run
    assert main(["plot", what, path]) == 0
    out = capsys.readouterr().out.strip()
    assert out == f"{path}/plots/{what}.png"
    image = Image.open(out).convert("RGB")
    assert image.width > 800 and len(set(image.resize((200, 100)).getdata())) > 50


def test_tensorboard_has_them_too(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, path = run
    events = EventAccumulator(f"{path}/tensorboard").Reload()
    for tag in ("scale/003", "overflows/000", "underflow/001", "block_norm/002"):
        assert len(events.Scalars(f"gradients/{tag}")) == 6, tag


@pytest.mark.slow
def test_a_run_of_two_machines_goes_on_with_one(run):
    folder, _ = run
    lines = run_distributed(gone_on_with, 1, folder)[0]
    assert [line["step"] for line in lines] == list(range(1, 10))
    # One replica instead of two: half the scale, and on from where it was.
    assert lines[6]["scale"][0] == pytest.approx(lines[5]["scale"][0] / 2 * 2**0.001, rel=1e-6)
    assert lines[8]["loss"] < lines[3]["loss"]


def test_a_run_without_such_numbers_is_told_so(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(DataError, match=r"has no scales; train\.precision=fp16 has them"):
        plot("scales", str(tmp_path))
    with pytest.raises(DataError, match="no run here"):
        plot("compression", str(tmp_path / "nowhere"))


def test_what_was_not_measured_is_null_in_the_log_and_a_gap_in_the_plot(tmp_path):
    config = make(tmp_path)
    run = Run(config.paths.run, config, process_group.init(), resume=False, shape=())
    run.open(0)
    for update, error in ((1, 0.5), (2, math.nan), (3, 0.4)):
        sizes = {"sent_megabytes": 1.0, "dense_megabytes": 4.0}
        run.log(update, compression_error=[error, 0.2], **sizes)
    run.close()
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()
    lines = read_log(tmp_path / "run")
    assert [line["compression_error"] for line in lines] == [[0.5, 0.2], [None, 0.2], [0.4, 0.2]]
    axes = _compression(str(tmp_path), lines).axes[0]
    assert np.isnan(axes.lines[0].get_ydata(orig=False)).tolist() == [False, True, False]
