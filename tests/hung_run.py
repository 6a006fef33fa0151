"""Runs under torchrun of which a rank is made to hang, or to be slow."""

import os
import re
import subprocess
import sys

from dalle_dist.distributed import meeting

PROGRAM = '''"""dalle-dist with one fault, on the rank that FAULTY names."""

import os
import signal
import time

from dalle_dist.cli import program
from dalle_dist.train import loop, optimizer_step, transformer

FAULT, MINE = os.environ["FAULT"], os.environ["RANK"] == os.environ["FAULTY"]
make, loss = optimizer_step.OptimizerSteps.make, transformer.TransformerStage.loss
validate = transformer.TransformerStage.validate


def hang(*_):
    time.sleep(1000)


def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)


def at_step_3(fault):
    def made(self, step, *rest):
        if step == 3:
            fault()
        return make(self, step, *rest)

    optimizer_step.OptimizerSteps.make = made


def slowly(seconds, method):
    def later(*arguments):
        time.sleep(seconds)
        return method(*arguments)

    return later


if MINE and FAULT in ("hang", "stop"):
    at_step_3({"hang": hang, "stop": stop}[FAULT])
if MINE and FAULT == "slow":
    transformer.TransformerStage.loss = slowly(0.3, loss)
if FAULT == "long evaluation":
    transformer.TransformerStage.validate = slowly(float(os.environ["SECONDS"]), validate)
program()
'''


def start(arguments, ranks, **environ):
    """What a run under torchrun printed, and the exit codes that it reports of its ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(meeting.free_port()), *arguments]
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environ
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=180)
    said = done.stdout + done.stderr
    report = re.findall(r"rank +: (\d+).*?\n +exitcode +: (-?\d+)", said)
    return said, {int(rank): int(code) for rank, code in report}
