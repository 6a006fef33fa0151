"""Runs on two machines: started by MPI with nothing but addresses, and with the cable pulled."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from two_machines import ADDRESSES, INTERFACE, TwoMachines

from dalle_dist.errors import HUNG
from dalle_dist.train.run import read_log

STEPS = 60


@pytest.fixture
def machines(slow_network, tmp_path):
    with slow_network.SlowNetwork(None) as network:
        yield TwoMachines(network, tmp_path)


def written(folder, **train):
    config = tiny_run.make(folder, zero_stage=2, prompts=[], sample_every=0, **train)
    return tiny_run.write_config(config, folder / "config.yaml")


def losses(run):
    return [line["loss"] for line in read_log(run) if "loss" in line]


@pytest.mark.slow
def test_deepspeed_starts_two_ranks_on_each_machine_by_open_mpi(machines, tmp_path):
    """The hosts have no names that anybody could look up."""
    config = written(tmp_path, steps=4)
    alone = machines.start(0, [sys.executable, "-m", "dalle_dist", "train", config])
    said = alone.communicate(timeout=120)[0]
    assert alone.returncode == 0, said
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    launch = ["deepspeed", "--hostfile", str(hosts), "--launcher", "openmpi"]
    launch += ["--launcher_args", f"--mca btl_tcp_if_include {INTERFACE}"]
    launch += ["--module", "dalle_dist", "train", config, f"paths.run={tmp_path / 'mpi'}"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = machines.start(0, launch, **root)
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    manifest = tmp_path / "mpi" / "checkpoints" / "step-00000004" / "manifest.json"
    assert json.loads(manifest.read_text())["layout"]["ranks"] == 4
    found = losses(tmp_path / "mpi")
    assert len(found) == 4
    assert found == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def start(machines, config, *overrides):
    """A rank on each machine, of a run of its own port."""
    environ = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environ |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "dalle_dist", "train", config, *overrides]
    return [machines.start(rank, command, RANK=str(rank), **environ) for rank in (0, 1)]


def ends(processes, seconds):
    said = [process.communicate(timeout=seconds)[0] for process in processes]
    return [process.returncode for process in processes], said


def await_step(run, step, processes):
    while not (Path(run, "log.jsonl").exists() and len(losses(run)) >= step):
        assert all(process.poll() is None for process in processes), ends(processes, 60)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_outlives_a_cable_pulled_for_20_seconds(machines, tmp_path):
    config = written(tmp_path, steps=STEPS, save_every=STEPS, eval_every=STEPS)
    whole = start(machines, config, f"paths.run={tmp_path / 'whole'}")
    assert ends(whole, 180)[0] == [0, 0]
    cut = start(machines, config)
    await_step(tmp_path / "run", 5, cut)
    machines.pull_the_cable()
    time.sleep(2)
    before = len(losses(tmp_path / "run"))
    time.sleep(18)
    assert len(losses(tmp_path / "run")) == before < STEPS, "no step without the other machine"
    machines.put_it_back()
    statuses, said = ends(cut, 180)
    assert statuses == [0, 0], said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_cable_pulled_for_good_ends_both_ranks_which_go_on_later(machines, tmp_path):
    config = written(tmp_path, steps=STEPS, save_every=3, eval_every=STEPS)
    cut = start(machines, config, "watch.hang_after=8")
    await_step(tmp_path / "run", 5, cut)
    machines.pull_the_cable()
    statuses, said = ends(cut, 120)
    assert statuses == [HUNG, HUNG], said
    (by_first,), (by_second,) = [re.findall("dalle-dist: error: (.*)", text) for text in said]
    assert "s: rank 1 (host node2) does not answer (dead, stopped, starved or cut off)" in by_first
    assert "rank 1 (host node2) waits in all_reduce" in by_second
    assert by_second.endswith("; the other ranks cannot be reached")
    machines.put_it_back()
    done = losses(tmp_path / "run")
    assert 5 <= len(done) < STEPS
    again = start(
        machines, config, "--resume", "auto", f"train.steps={len(done) + 3}", "watch.hang_after=60"
    )
    statuses, said = ends(again, 120)
    assert statuses == [0, 0], said
    assert len(losses(tmp_path / "run")) == len(done) + 3
