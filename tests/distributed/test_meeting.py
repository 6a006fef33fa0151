"""How ranks find one another: real processes under the variables that srun sets."""

import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from dalle_dist.distributed import interfaces, meeting
from dalle_dist.distributed.launchers import LaunchInfo, ports_of

RANK = """
import os
from dalle_dist.distributed import meeting, process_group
from dalle_dist.errors import ConfigError
meeting.TELL = 0.5
try:
    ranks = process_group.init()
    print("met", ranks.rank, ranks.sum([1.0]), os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
    process_group.leave(0)
except ConfigError as error:
    print("error", error, flush=True)
    raise SystemExit(2)
"""


def environ(rank, world=2, job="77", **more):
    step = {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{world})", "SLURM_STEP_NODELIST": "localhost",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    return {k: v for k, v in os.environ.items() if not k.startswith("GLOO")} | step | more


def start(rank, **more):
    return subprocess.Popen(
        [sys.executable, "-c", RANK],
        env=environ(rank, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def job():
    """A job whose first port is free."""
    port = meeting.free_port()
    for number in range(1, 100_000):
        if 12_000 + number * 31 % 20_000 == port:
            return str(number)
    raise AssertionError("31 and 20,000 have no factor in common")


@pytest.fixture
def taken(job):
    """The job's first port, on which another program listens, and answers nothing."""
    with socket.create_server(("", 12_000 + int(job) * 31 % 20_000)) as server:
        held = []

        def accept():
            try:
                while True:
                    held.append(server.accept())
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield server
        server.shutdown(socket.SHUT_RDWR)


def test_ranks_meet_on_another_port_where_theirs_is_taken(job, taken):
    ranks = [start(rank, job=job) for rank in (0, 1)]
    for rank, process in enumerate(ranks):
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert f"met {rank} [2.0] lo" in said


def test_a_port_that_the_user_chose_is_not_changed_in_silence(job, taken):
    port = str(taken.getsockname()[1])
    process = start(0, job=job, MASTER_PORT=port)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"port {port} cannot be listened on" in said and "set MASTER_PORT" in said


def test_a_store_of_another_launch_is_passed_over(job):
    info = LaunchInfo("srun", 1, 0, 2, 1, "localhost", 0, "77.0.")
    store = meeting.open_store([0])
    store.set("token", "76.0.")
    assert meeting._store_at(info, store.port) is None
    store.set("token", "77.0.")
    assert meeting._store_at(info, store.port) is not None


def test_a_rank_that_waits_says_for_whom(job):
    first = start(0, job=job)
    lines = iter(first.stdout.readline, "")
    assert next(line for line in lines if "waits" in line).startswith(
        "dalle-dist: rank 0 waits for 1 (1) of 2 ranks, on port "
    )
    second = start(1, job=job)
    assert "met 1" in second.communicate(timeout=60)[0]
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_a_rank_without_rank_0_says_where_it_looks(job):
    alone = start(1, job=job)
    lines = iter(alone.stdout.readline, "")
    line = next(line for line in lines if "waits" in line)
    alone.kill()
    assert re.match(r"dalle-dist: rank 1 waits for rank 0 at localhost:\d+", line)
    alone.communicate()


def test_ports_to_choose_from_are_many_and_differ():
    info = LaunchInfo("srun", port=31_999)
    ports = ports_of(info, {})
    assert ports[0] == 31_999 and len(set(ports)) == 8
    assert all(12_000 <= port < 32_000 for port in ports)
    assert ports_of(info, {"MASTER_PORT": "31999"}) == [31_999]


def test_the_interface_is_the_one_that_has_the_address():
    assert interfaces.interface_towards("127.0.0.1") == "lo"
    own = interfaces._address("lo")
    assert own == "127.0.0.1"
    assert interfaces.interface_towards("no address") == ""
    assert interfaces.address_of("no-such-host.invalid") == ""
