"""One run's losses under every launcher, started as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from dalle_dist.train.run import read_log

BIN = Path(sys.executable).parent
MODULE = ["--module", "dalle_dist"]
SINGLE = [sys.executable, "-m", "dalle_dist"]
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", *MODULE],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *MODULE],
    "mpirun": [
        str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", *SINGLE,
    ],
}  # fmt: skip


def _losses(command, folder, name, **train):
    config = tiny_run.make(folder, zero_stage=2, steps=4, **train)
    path = tiny_run.write_config(config, folder / f"{name}.yaml")
    run = folder / name
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environ |= {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{environ['PATH']}"}
    done = subprocess.run(
        [*command, "train", path, f"paths.run={run}"],
        capture_output=True, text=True, env=environ, timeout=200, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{run}: complete at step 4" in done.stdout
    assert (run / "release" / "transformer.safetensors").is_file()
    return [line["loss"] for line in read_log(run) if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    return folder, _losses(SINGLE, folder, "single")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_losses_of_a_single_process(alone, launcher):
    folder, expected = alone
    found = _losses(LAUNCHERS[launcher], folder, launcher)
    manifest = folder / launcher / "checkpoints" / "step-00000004" / "manifest.json"
    assert json.loads(manifest.read_text())["layout"]["ranks"] == 2
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
