"""What goes wrong in a loader process is one line with the sample's key; nothing is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from dalle_dist.data.loader import batches
from dalle_dist.errors import DataError

ROOT = Path(__file__).parents[2]


class Numbers(Dataset):
    """Its sample 21 is bad, in a way of one's choice."""

    def __init__(self, bad):
        self.bad = bad

    def describe(self, position):
        return f"sample key-{position}"

    def __getitem__(self, position):
        if position == 21:
            self.bad()
        return torch.tensor(position)


def stacked(samples):
    return torch.stack([*samples])


def raise_value_error():
    raise ValueError("no such colour")


def raise_data_error():
    raise DataError("00003.tar: damaged")


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def read_all(bad, workers):
    stream = batches(
        Numbers(bad), batch_size=8, micro_batch=4, rank=1, world=2, start=0, workers=workers,
        collate=stacked,
    )  # fmt: skip
    return [next(stream).tolist() for _ in range(6)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_in_a_loader_process_names_the_sample(workers, capfd):
    message = r"^sample key-21: ValueError\('no such colour'\)$"
    with pytest.raises(DataError, match=message):
        read_all(raise_value_error, workers)
    assert "raise_value_error" in capfd.readouterr().err, "for who has to find out why"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_says_what_to_do_comes_as_it_is(workers):
    with pytest.raises(DataError, match=r"^00003.tar: damaged$"):
        read_all(raise_data_error, workers)


def test_an_unforeseen_exception_of_the_process_itself_stays_what_it_is():
    with pytest.raises(ValueError, match="no such colour"):
        read_all(raise_value_error, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_process_that_is_killed_names_the_sample_it_read(workers):
    with pytest.raises(DataError, match=r"sample key-21: the loader process .* ended"):
        read_all(kill_itself, workers)


KILLED = """
import multiprocessing
import torch
from dalle_dist.data.loader import batches
from tests.data.test_loader_failures import Numbers, stacked

class Large(Numbers):
    def __getitem__(self, position):
        return torch.full((250_000,), position)

stream = batches(Large(None), batch_size=8, micro_batch=4, rank=0, world=1, start=0, workers=2,
                 collate=stacked)
for _ in range(20):
    next(stream)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
while True:
    next(stream)
"""


def test_a_kill_leaves_no_shared_memory():
    """The names of torch's segments in /dev/shm have the process that made them."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    loaders = process.stdout.readline().split()
    assert len(loaders) == 2
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = [path.name for path in Path("/dev/shm").iterdir()]
    assert not [name for name in left for loader in loaders if f"torch_{loader}_" in name]
