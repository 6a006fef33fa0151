"""One run's losses under every launcher, started as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from dalle_dist.distributed.meeting import free_port
from dalle_dist.train.run import read_log

BIN = Path(sys.executable).parent
MODULE = ["--module", "dalle_dist"]
SINGLE = [sys.executable, "-m", "dalle_dist"]
MPIRUN = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n"]
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", *MODULE],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *MODULE],
    "mpirun": [*MPIRUN, "2", *SINGLE],
    "mpirun of four": [*MPIRUN, "4", *SINGLE],
}


def _start(command, folder, name):
    config = tiny_run.make(folder, zero_stage=2, steps=4)
    path = tiny_run.write_config(config, folder / f"{name}.yaml")
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environ |= {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{environ['PATH']}"}
    return subprocess.Popen(
        [*command, "train", path, f"paths.run={folder / name}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, cwd=folder,
    )  # fmt: skip


def _losses(processes, run):
    """Of a run that these processes, the first of which has rank 0, carry out together."""
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "".join(said)
    assert f"{run}: complete at step 4" in said[0]
    assert (run / "release" / "transformer.safetensors").is_file()
    return [line["loss"] for line in read_log(run) if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    return folder, _losses([_start(SINGLE, folder, "single")], folder / "single")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_losses_of_a_single_process(alone, launcher):
    folder, expected = alone
    processes = [_start(LAUNCHERS[launcher], folder, launcher)]
    ranks = 4 if "four" in launcher else 2
    assert_ranks_have(expected, processes, folder / launcher, ranks)


@pytest.mark.slow
def test_deepspeed_on_each_node_of_a_hostfile(alone):
    """Two lines of loopback's addresses; without ssh the command is given on each node."""
    folder, expected = alone
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    nodes = ["deepspeed", "--hostfile", "hosts", "--no_ssh", *meeting, "--node_rank"]
    processes = [_start([*nodes, str(node), *MODULE], folder, "hostfile") for node in (0, 1)]
    assert_ranks_have(expected, processes, folder / "hostfile", 2)


def assert_ranks_have(expected, processes, run, ranks):
    found = _losses(processes, run)
    manifest = run / "checkpoints" / "step-00000004" / "manifest.json"
    assert json.loads(manifest.read_text())["layout"]["ranks"] == ranks
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
