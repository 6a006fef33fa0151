"""The Slurm scripts that come with the package: complete, and written into any folder."""

import re
import subprocess
from pathlib import Path

import pytest

from dalle_dist.cli import main
from dalle_dist.jobs.scripts import whole_script

ROOT = Path(__file__).parents[2]
NAMES = ["data_build", "encode", "evaluate", "generate", "train", "train_clip", "train_dvae"]
SCRIPTS = sorted(["job.sh", "site.sh", *(f"{name}.sbatch" for name in NAMES)])


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


def test_what_a_site_has_filled_in_stays():
    Path("slurm").mkdir()
    Path("slurm/site.sh").write_text("module load cuda\n")
    assert main(["slurm"]) == 0
    assert Path("slurm/site.sh").read_text() == "module load cuda\n"
    assert len(list(Path("slurm").iterdir())) == len(SCRIPTS)


def test_slurm_refuses_a_file_for_a_folder(capsys):
    Path("slurm").touch()
    assert main(["slurm"]) == 2
    assert "slurm: File exists; name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_each_script_says_what_it_is_and_asks_for_all_that_it_uses(name):
    text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
    for word in ("Runs", "Expects", "Takes", "Command"):
        assert re.search(rf"^# {word} +\S", text, re.MULTILINE), word
    assert f"slurm/{name}.sbatch" in text
    settings = dict(re.findall(r"^##?SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
    asked = {"cpus-per-task", "mem", "time", "account", "partition", "nodes", "ntasks-per-node"}
    assert asked <= settings.keys()
    assert settings.get("gpus-per-node", "1") == settings["ntasks-per-node"]
    assert "#SBATCH --requeue\n" in text and settings["signal"].startswith("USR1@")
    array = name in ("encode", "data_build")
    assert ("--array" in text) == array and ("%A_%a" in settings["output"]) == array


@pytest.mark.parametrize("name", [*NAMES, "job", "site"])
def test_scripts_are_bash(name):
    file = next((ROOT / "slurm").glob(f"{name}.*"))
    subprocess.run(["bash", "-n", file], check=True)


def test_a_whole_script_has_its_settings_its_variables_the_site_and_the_command():
    text = whole_script(
        "train",
        {"nodes": "3", "account": "lab", "qos": "long", "gres": "none"},
        {"DALLE_DIST_REQUEUE": "0"},
        "module load cuda\n",
        ["cc3m", "paths.run=a b"],
    )
    head, _, body = text.partition("\nexport ")
    settings = re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", head, re.MULTILINE)
    assert len(settings) == len(dict(settings))
    assert {"nodes": "3", "account": "lab", "qos": "long", "gres": "none"}.items() <= dict(
        settings
    ).items()
    assert "##SBATCH --partition" in head and "scontrol show" not in text
    body = f"export {body}"
    assert body.startswith("export DALLE_DIST_REQUEUE=0\nset -- train cc3m 'paths.run=a b'\n")
    assert body.index("module load cuda") < body.index("on_all()")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
