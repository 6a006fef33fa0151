"""Every script of `slurm/` on a real slurmctld with two slurmd, from pictures to figures."""

import subprocess
import sys

import pytest
import tiny_run
from PIL import Image

from dalle_dist.cli import main
from slurm.jobs import Job, losses

pytestmark = pytest.mark.slow

CLIP = [
    "clip.image_size=8", "clip.patch_size=4", "clip.image_width=32", "clip.image_layers=1",
    "clip.text_width=32", "clip.text_layers=1", "clip.text_tokens=12", "clip.features=16",
    "clip.image_heads=2", "clip.text_heads=2",
    "clip_train.batch_size=8", "clip_train.steps=4", "clip_train.warmup=1",
    "clip_train.eval_every=4", "clip_train.sample_every=4", "clip_train.precision=fp32",
]  # fmt: skip

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


def pictures(folder, count):
    folder.mkdir()
    for number in range(count):
        colour = tiny_run.COLOURS[number % 8]
        Image.new("RGB", (8, 8), colour).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"{colour} square number {number}")


def test_every_script_from_pictures_to_figures(cluster, tmp_path):
    pictures(tmp_path / "pictures", 60)
    config = tiny_run.make(tmp_path / "inputs", steps=20, save_every=20, eval_every=20)
    config = tiny_run.with_paths(
        config,
        **{name: str(tmp_path / name) for name in ("images", "tokens", "dvae_run", "clip_run")},
        run=str(tmp_path / "run"),
    )
    path = tiny_run.write_config(config, tmp_path / "config.yaml")
    first = ["dvae_train.steps=6", "dvae_train.batch_size=4", "dvae_train.warmup=1"]

    def job(script, *words, **options):
        done = Job(cluster, tmp_path, script, *words, **options)
        done.assert_completed()
        return done

    array = {"options": ("--array=1-2", "--nodes=1", f"--output={tmp_path}/%x-%a.out")}
    images = str(tmp_path / "images")
    job("data_build", str(tmp_path / "pictures"), images, "--samples-per-shard", "10", **array)
    assert (tmp_path / "images/train/index.json").is_file()
    said = job("train_dvae", path, *first).said
    assert "train-dvae: finished" in said and (tmp_path / "dvae_run/release").is_dir()
    job("encode", path, **array)
    assert (tmp_path / "tokens/train/index.json").is_file()
    assert main(["tokenizer", "train", path]) == 0
    said = job("train", path, DALLE_DIST_DOCTOR="full").said
    assert "train: finished" in said and "2 ranks x 1 thread" in said, said
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 21))
    assert job("train", path).said.endswith("train: finished\ntrain: finished; nothing to do\n")
    assert "train-clip: finished" in job("train_clip", path, *CLIP).said
    release = str(tmp_path / "run/release")
    words = ["red square", "-n", "4", "--batch-size", "2", "--format", "tar", "-o"]
    job("generate", release, *words, str(tmp_path / "drawn"))
    assert main(["generate", release, *words, str(tmp_path / "alone")]) == 0
    drawn, alone = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("drawn", "alone")
    )
    assert len(drawn) >= 2 and drawn == alone
    job("evaluate", release, images, "--captions", "2", "-o", str(tmp_path / "figures"))
    assert (tmp_path / "figures/figures.csv").is_file()


def test_scripts_written_into_another_folder_run_from_there(cluster, tmp_path):
    config = tiny_run.make(tmp_path)
    path, out = tiny_run.write_config(config, tmp_path / "c.yaml"), tmp_path / "out"
    cluster.run("dalle-dist", "slurm", "cluster", cwd=tmp_path)
    site = tmp_path / "cluster/site.sh"
    site.write_text(site.read_text() + "echo the site is $(hostname)\n")
    options = ("-N2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
    job = cluster.submit(*options, f"--output={out}", "cluster/train.sbatch", path, cwd=tmp_path)
    assert cluster.wait(job, 120) == "COMPLETED", out.read_text()
    assert "the site is" in out.read_text() and "train: finished" in out.read_text()
    assert len(losses(config.paths.run)) == 6


def test_submit_keeps_the_script_in_the_run_and_a_chain_ends_it(cluster, tmp_path):
    config = tiny_run.make(tmp_path)
    path = tiny_run.write_config(config, tmp_path / "c.yaml")
    words = "--nodes 2 --gpus-per-node 0 --cpus-per-task 1 --chain 2 --job-name night"
    said = cluster.run("dalle-dist", "submit", path, *words.split(), cwd=tmp_path).stdout
    first, second = said.partition(";")[0].removeprefix("submitted job ").split(", then ")
    assert cluster.wait(second, 120) == "COMPLETED"
    outs = [(tmp_path / f"slurm-night-{job}.out").read_text() for job in (first, second)]
    assert "train: finished" in outs[0] and "nothing to do" in outs[1]
    (script,) = (tmp_path / "run/slurm").iterdir()
    assert script.name.endswith(f"-{first}.sbatch") and "set -- train" in script.read_text()
    assert len(losses(config.paths.run)) == 6


def test_a_job_that_would_leave_gpus_idle_is_refused(cluster, tmp_path):
    job = Job(cluster, tmp_path, "train", "emoji", options=("--gpus-per-node=2",))
    assert job.wait(60) == "FAILED"
    assert "1 tasks for 2 GPUs on a node; add --ntasks-per-node 2" in job.said


def test_a_command_typed_into_the_shell_of_srun_is_one_process(cluster, tmp_path):
    config = tiny_run.make(tmp_path)
    path = tiny_run.write_config(config, tmp_path / "c.yaml")
    # `script` gives srun a terminal, and the shell in it what is typed.
    shell = subprocess.run(
        ["script", "-qec", "srun --pty --nodes=1 --ntasks=2 bash --norc", "/dev/null"],
        input=f"dalle-dist train {path}\nexit\n",
        env=cluster.env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "complete at step 6" in shell.stdout, shell.stdout
    assert "CPU, 1 rank x 1 thread, 1 node (one process)" in shell.stdout, shell.stdout
