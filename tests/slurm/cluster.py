"""A real Slurm of two nodes on loopback: munged, slurmctld and two slurmd in a temporary folder."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Of a job on both, which have no GPUs that a program could use.
NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=0")
ROOT = Path(__file__).resolve().parents[2]


class Cluster:
    """Starts the daemons in `folder`; `submit` and `wait` are what a user would type."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # the node names n1 and n2 are in nobody's DNS
            "OMP_NUM_THREADS": "1",
            "DALLE_DIST_DOCTOR": "0",  # but where a test asks for it
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.daemons: list[subprocess.Popen] = []
        ports = [_free_port() for _ in range(3)]
        (folder / "slurm.conf").write_text(_configuration(folder, *ports))
        # Two files stand in for GPUs: Slurm counts them, and nobody opens them.
        for i in range(2):
            (folder / f"gpu{i}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")

    def start(self):
        self._start_munge()
        self._start("slurmctld", "-D", "-i")
        self.slurmd = {node: self._start("slurmd", "-D", "-N", node) for node in ("n1", "n2")}
        self._await_nodes()

    def lose(self, node: str):
        """End a node's daemon at once, as a machine does that loses its power."""
        self.slurmd[node].kill()
        self.slurmd[node].wait()

    def bring_back(self, node: str):
        self.slurmd[node] = self._start("slurmd", "-D", "-N", node)

    def _start_munge(self):
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
        files["seed-file"] = "munge.seed"
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *options)
        until(lambda: (self.folder / "munge.sock").exists(), 10, "munged's socket")

    def _start(self, program: str, *arguments: str) -> subprocess.Popen:
        log = (self.folder / f"{program}-{len(self.daemons)}.log").open("w")
        command = [shutil.which(program), *arguments]
        daemon = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        self.daemons.append(daemon)
        return daemon

    def _await_nodes(self):
        def idle():
            result = self.run("sinfo", "-h", "-o", "%D %t", check=False)
            return result.stdout.split() == ["2", "idle"]

        until(idle, 60, "two idle nodes")

    def run(self, *command: str, check: bool = True, cwd: Path = ROOT, **environ: str):
        return subprocess.run(
            command, env=self.env | environ, cwd=cwd, capture_output=True, text=True, check=check
        )

    def submit(self, *arguments: str, cwd: Path = ROOT, **environ: str) -> str:
        """Job id of `sbatch ARGUMENTS`."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environ).stdout.strip()

    def wait(self, job: str, seconds: float = 300) -> str:
        """The job's state once it is over."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.state(job) in ended, seconds, f"the end of job {job}")
        return self.state(job)

    def state(self, job: str) -> str:
        """Of all tasks of an array the first that is found, COMPLETED last."""
        text = self.run("scontrol", "show", "job", job, check=False).stdout
        states = re.findall(r"JobState=(\S+)", text)
        return min(states, key=lambda state: state == "COMPLETED", default="UNKNOWN")

    def stop(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # The steps of a job that still runs outlive slurmd.
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Every process of this cluster and of its jobs: they share our SLURM_CONF."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found


def install() -> str | None:
    """Install Slurm where we may; the reason when there is none."""
    if all(shutil.which(program) for program in PROGRAMS):
        return None if os.geteuid() == 0 else "a Slurm of one's own needs root"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "needs Debian's slurm-wlm and munge, and root"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        result = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True
        )
    return None if result.returncode == 0 else f"apt-get: {result.stderr.strip()[-200:]}"


def _configuration(folder: Path, controller: int, first: int, second: int) -> str:
    host = socket.gethostname()
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
SchedulerType=sched/backfill
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 Gres=gpu:2
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s for {what}")
        time.sleep(0.2)
