"""A file of torch.save that runs a command when it is unpickled."""

import os

import torch


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def write_malicious(path, mark):
    """A file that makes the file `mark` if it is trusted."""
    torch.save({"state_dict": {"encoder.conv_in.weight": Runs(f"touch {mark}")}}, path)
