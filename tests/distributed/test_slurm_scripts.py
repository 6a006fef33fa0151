"""The Slurm scripts that come with the package: found from any folder, and written for Slurm."""

import subprocess
from pathlib import Path

import pytest

from dalle_dist.cli import main
from dalle_dist.distributed import slurm_scripts

ROOT = Path(__file__).parents[2]
SCRIPTS = ["job.sh", "progress.py", "train.sbatch", "train_dvae.sbatch"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_slurm_writes_the_scripts_as_they_are_shipped_and_may_do_so_twice(capsys):
    for _ in range(2):
        assert main(["slurm"]) == 0
        assert capsys.readouterr().out.split() == [f"slurm/{name}" for name in SCRIPTS]
    for name in SCRIPTS:
        assert Path("slurm", name).read_text() == (ROOT / "slurm" / name).read_text()


def test_slurm_overwrites_nothing_that_differs(capsys):
    Path("slurm").mkdir()
    mine = Path("slurm/train.sbatch")
    mine.write_text("#!/bin/sh\n# mine\n")
    assert main(["slurm"]) == 2
    error = capsys.readouterr().err
    assert "slurm/train.sbatch differs from the shipped one" in error and error.count("\n") == 1
    assert mine.read_text() == "#!/bin/sh\n# mine\n"
    assert list(Path("slurm").iterdir()) == [mine]


def test_slurm_refuses_a_file_for_a_folder(capsys):
    Path("slurm").touch()
    assert main(["slurm"]) == 2
    assert "slurm: File exists; name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train", "train_dvae"])
def test_scripts_in_any_folder_find_their_neighbours(script, tmp_path):
    """As on a node: sbatch runs a copy from another place, in the folder of submission."""
    assert slurm_scripts.write_slurm("my cluster/scripts/")
    copy = tmp_path / "spool"
    copy.write_text(Path("my cluster/scripts", f"{script}.sbatch").read_text())
    environment = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(copy)], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    usage = f"usage: sbatch my cluster/scripts/{script}.sbatch PRESET [key=value ...]\n"
    assert done.stderr == usage
