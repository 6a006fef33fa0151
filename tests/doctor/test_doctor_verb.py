"""`dalle-dist doctor` as a user starts it: alone, and under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from dalle_dist.cli import main
from dalle_dist.doctor.checks import CHECKS

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
NAMES = [check.name for check in CHECKS]


@pytest.fixture
def config(tmp_path):
    made = tiny_run.make(tmp_path)
    return tiny_run.write_config(made, tmp_path / "tiny.yaml")


def names_in(table):
    return [name for name in NAMES if f"\n{name}" in table]


def test_a_sound_config_passes(config, tmp_path, capsys):
    assert main(["doctor", config]) == 0
    table = capsys.readouterr().out
    assert table.startswith("check ")
    assert set(names_in(table)) == set(NAMES) - {"space"}
    assert "\ndisk: run" in table and "read speed  " in table
    assert table.splitlines()[-1].startswith("ok")
    assert not (tmp_path / "run").exists()


def test_a_fault_gives_status_1_and_its_row(config, capsys):
    assert main(["doctor", config, "--quick", f"paths.run={config}/run"]) == 1
    table = capsys.readouterr().out
    assert "\nrun folder    FAIL " in table and "Traceback" not in table
    assert table.splitlines()[-1].startswith("FAIL: 1 row to repair")
    assert "\nread speed" not in table and "\nnetwork" not in table  # --quick


def test_without_a_config_what_needs_none_is_examined(capsys):
    assert main(["doctor", "--quick"]) == 0
    table = capsys.readouterr().out
    assert "\nsame config   skip     no PRESET is given" in table
    assert "\nversions      ok " in table


def test_a_users_error_keeps_its_status(capsys):
    assert main(["doctor", "no-such-preset"]) == 2
    assert "no preset or file" in capsys.readouterr().err


def test_another_verb_has_its_own_run_folder(config, tmp_path, capsys):
    assert main(["doctor", config, "--quick", "--for", "train-dvae"]) == 0
    assert f"{tmp_path}/dvae_run:" in capsys.readouterr().out


def under_torchrun(folder, *arguments):
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*TORCHRUN, "-m", "dalle_dist", "doctor", *arguments],
        capture_output=True, text=True, env=environ, cwd=folder, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_two_ranks_print_one_table(config, tmp_path):
    done = under_torchrun(tmp_path, config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("check ") == 1
    assert "2 x CPU on 1 host" in done.stdout and "inside nodes, all-reduce" in done.stdout
    broken = under_torchrun(tmp_path, config, f"paths.run={config}/run")
    assert broken.returncode == 1
    assert broken.stdout.count("check ") == 1
    assert broken.stdout.splitlines()[-1].startswith("FAIL: 1 row to repair")
