"""The sbatch scripts on a real slurmctld with two slurmd, one rank on each."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest
import tiny_run
from PIL import Image

from dalle_dist.data.shards import ShardWriter
from dalle_dist.train.run import read_log
from slurm.conftest import until

pytestmark = pytest.mark.slow

ALL_REDUCE = """
from dalle_dist.distributed import process_group
ranks = process_group.init()
print(ranks.launcher, ranks.rank, ranks.world, ranks.sum([ranks.rank + 1.0]))
process_group.shutdown()
"""


def test_ranks_meet_over_two_nodes(cluster, tmp_path):
    program = tmp_path / "all_reduce.py"
    program.write_text(ALL_REDUCE)
    out = tmp_path / "out"
    job = cluster.submit(
        "-N2",
        "--ntasks-per-node=1",
        f"--output={out}",
        "--wrap",
        f"srun {sys.executable} {program}",
    )
    assert cluster.wait(job, 60) == "COMPLETED", out.read_text()
    assert sorted(out.read_text().split("\n")[:2]) == ["srun 0 2 [3.0]", "srun 1 2 [3.0]"]


def write_images(folder):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "orange").save(buffer, format="PNG")
    for part in ("train", "held-out"):
        with ShardWriter(str(folder / part), "images", {}) as writer:
            for i in range(8):
                writer.write(f"{i}", {"png": buffer.getvalue(), "txt": b"an orange square"})


def submit(cluster, script, config, out, *options):
    """The sbatch script as a user would submit it, on both nodes."""
    return cluster.submit(
        "-N2", "--ntasks-per-node=1", f"--output={out}", *options, f"slurm/{script}", config
    )


def steps(folder):
    return [line["step"] for line in read_log(folder) if "loss" in line or "nll" in line]


def test_stage_1_trains_on_two_nodes(cluster, tmp_path):
    config = tiny_run.make(tmp_path)
    write_images(Path(config.paths.images))
    stage1 = dataclasses.replace(config.dvae_train, batch_size=4, steps=6, log_every=1)
    paths = dataclasses.replace(config.paths, dvae_run=str(tmp_path / "stage1"))
    config = dataclasses.replace(config, dvae_train=stage1, paths=paths)
    path, out = tiny_run.write_config(config, tmp_path / "c.yaml"), tmp_path / "out"
    job = submit(cluster, "train_dvae.sbatch", path, out)
    assert cluster.wait(job, 120) == "COMPLETED", out.read_text()
    assert (tmp_path / "stage1/release/config.yaml").exists(), out.read_text()
    assert steps(tmp_path / "stage1") == [1, 2, 3, 4, 5, 6]


def test_stage_2_saves_on_usr1_requeues_itself_and_finishes(cluster, tmp_path):
    config = tiny_run.make(tmp_path, steps=400, save_every=400, eval_every=400, sample_every=400)
    path, out = tiny_run.write_config(config, tmp_path / "c.yaml"), tmp_path / "out"
    job = submit(cluster, "train.sbatch", path, out)
    log = Path(config.paths.run) / "log.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 5, 90, "five steps")
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait(job, 240) == "COMPLETED", out.read_text()
    text = out.read_text()
    assert f"requeueing job {job}" in text and text.count("--resume auto goes on") == 1, text
    assert (Path(config.paths.run) / "release/config.yaml").exists()
    assert steps(Path(config.paths.run)) == list(range(1, 401))


def test_scripts_written_into_another_folder_run_from_there(cluster, tmp_path):
    config = tiny_run.make(tmp_path)
    path, out = tiny_run.write_config(config, tmp_path / "c.yaml"), tmp_path / "out"
    cluster.run("dalle-dist", "slurm", "cluster", cwd=tmp_path)
    options = ("-N2", "--ntasks-per-node=1", f"--output={out}")
    job = cluster.submit(*options, "cluster/train.sbatch", path, cwd=tmp_path)
    assert cluster.wait(job, 120) == "COMPLETED", out.read_text()
    assert "train: finished" in out.read_text()
    assert steps(Path(config.paths.run)) == list(range(1, 7))


def test_a_job_that_makes_no_progress_is_not_requeued(cluster, tmp_path):
    config = tiny_run.make(tmp_path)
    Path(config.paths.tokenizer).unlink()
    path, out = tiny_run.write_config(config, tmp_path / "c.yaml"), tmp_path / "out"
    job = submit(cluster, "train.sbatch", path, out)
    assert cluster.wait(job, 90) == "FAILED"
    assert "newest checkpoint as before (none); not requeued" in out.read_text()


def test_a_job_that_would_leave_gpus_idle_is_refused(cluster, tmp_path):
    out = tmp_path / "out"
    options = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=2", f"--output={out}")
    job = cluster.submit(*options, "slurm/train.sbatch", "emoji")
    assert cluster.wait(job, 60) == "FAILED"
    assert "1 tasks for 2 GPUs on a node; add --ntasks-per-node 2" in out.read_text()
