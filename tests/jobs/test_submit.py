"""`dalle-dist submit`: planned, written, and given to sbatch."""

import os

import pytest

from dalle_dist.cli import main


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A program of this name, which keeps what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\ncat >{tmp_path}/script\necho 77\n'
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_job_has_what_was_asked_for_and_its_script_is_kept(sbatch, capsys):
    options = ["--nodes", "2", "--time", "24:00:00", "--account", "lab", "--sbatch", "gres=shard:1"]
    assert main(["submit", "cc3m", "paths.run=runs/x", "train.micro_batch=8", *options]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("plan: ") and "times 24:00:00" in said.out
    assert "submitted job 77" in said.out and "runs/x/slurm/" in said.out
    asked = (sbatch / "asked").read_text().split()
    for option in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=24:00:00",
                   "--account=lab", "--gres=shard:1", "--parsable"):  # fmt: skip
        assert option in asked
    (kept,) = (sbatch / "runs/x/slurm").iterdir()
    text = kept.read_text()
    assert kept.name.endswith("-77.sbatch") and text == (sbatch / "script").read_text()
    assert "#SBATCH --account=lab\n" in text
    assert "\nset -- train cc3m paths.run=runs/x train.micro_batch=8\n" in text


def test_what_does_not_fit_is_submitted_by_force_alone(sbatch, capsys):
    words = ["submit", "12b", "paths.run=x", "--gpus-per-node", "1", "--gpu", "v100-16"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "does not fit: " in said.err and "not submitted" in said.err
    assert not (sbatch / "asked").exists() and not (sbatch / "x").exists()
    assert main([*words, "--force"]) == 0


def test_a_dry_run_prints_the_script_alone(sbatch, capsys):
    assert main(["submit", "emoji", "--gpus-per-node", "0", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -- train emoji\n" in text
    assert "#SBATCH --gpus-per-node=0\n" in text and "#SBATCH --ntasks-per-node=1\n" in text
    assert not (sbatch / "asked").exists() and not (sbatch / "runs").exists()


def test_a_chain_is_jobs_of_one_name_that_do_not_requeue(sbatch, capsys):
    words = ["--verb", "train-dvae", "--gpus-per-node", "0", "--chain", "3"]
    assert main(["submit", "emoji", "paths.dvae_run=d", *words]) == 0
    asked = (sbatch / "asked").read_text().splitlines()
    assert len(asked) == 3 and all("--dependency=singleton" in line for line in asked)
    assert "export DALLE_DIST_REQUEUE=0\n" in (sbatch / "script").read_text()
    assert "then 77, 77" in capsys.readouterr().out and (sbatch / "d/slurm").is_dir()


def test_the_sites_hook_of_the_working_folder_goes_into_the_script(sbatch, capsys):
    (sbatch / "slurm").mkdir()
    (sbatch / "slurm/site.sh").write_text("module load cuda/12\n")
    assert main(["submit", "emoji", "--gpus-per-node", "0", "--dry-run"]) == 0
    assert "module load cuda/12\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--nodes", "0"], "--nodes 0: at least 1"),
        (["--sbatch", "reservation"], "--sbatch reservation: NAME=X"),
        (["--site", "nowhere.sh"], "nowhere.sh: No such file"),
    ],
)
def test_errors_are_one_line(sbatch, capsys, words, reason):
    assert main(["submit", "emoji", "--gpus-per-node", "0", *words]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_without_slurm_there_is_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "emoji", "--gpus-per-node", "0"]) == 2
    assert "there is no sbatch here; --dry-run" in capsys.readouterr().err
