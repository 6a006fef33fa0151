"""Losses and gradient norms of tiny runs are those in tests/assets/losses/, one file per set-up.

`python -m tests.train.test_golden_losses --write` writes the files anew, after a change that is
meant to change them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle_dist.config import Config, from_dict, to_dict
from dalle_dist.data.shards import ShardWriter
from dalle_dist.testing import run_distributed
from dalle_dist.train.dvae import train_dvae
from dalle_dist.train.run import read_log
from dalle_dist.train.transformer import train
from tests import tiny_run

FOLDER = Path(__file__).parents[1] / "assets" / "losses"
STEPS = 10
Row = tuple[int, float, float]  # step, loss, gradient norm
POWERSGD = {"between_nodes": "powersgd", "local_world_size": 2} | {
    "rank_of": "shard", "rank": 8, "comm_dtype": "1-6-9",
}  # fmt: skip
# Norms lie on both sides of `clip`. A window of 3 steps never gains half of its loss: the learning
# rate is halved after step 9 on every machine.
TRAIN = {"steps": STEPS, "lr": 2e-3, "warmup": 2, "clip": 1.8, "weight_decay": 0.5} | {
    "plateau_window": 3, "plateau_gain": 0.5, "prompts": [], "eval_every": STEPS,
    "save_every": STEPS,
}  # fmt: skip
DVAE_TRAIN = {"steps": STEPS, "batch_size": 8, "lr": 3e-3, "warmup": 2, "lr_steps": STEPS} | {
    "temperature_steps": STEPS, "kl_steps": STEPS, "precision": "fp32", "augment": False,
    "log_every": 1, "clip": 0.12, "eval_every": STEPS, "sample_every": STEPS, "save_every": STEPS,
}  # fmt: skip
# Relative errors of losses that are allowed. Processors differ in the order of sums and in roots
# and exponentials, by some 1e-7 in fp32. A sum near the middle of two numbers of a 16-bit format
# then becomes the other one, off by 2^-8 (bf16) or 2^-11 (fp16) of itself. Measured on one
# processor, between the code of torch, oneDNN and MKL for AVX-512 with bf16 and theirs for AVX2: at
# most 5e-8 in fp32, 3e-5 in bf16, 2e-5 in fp16 (for SSE: 5e-8, 3e-4, 2e-5); of gradient norms at
# most 2e-7 in fp32, 5e-4 in bf16, 1e-4 in fp16. AMX multiplies bf16 exactly and sums in fp32, as
# AVX-512 does. Losses of stage 1 are small differences: at most 5e-7 of the largest.
RTOL = {"fp32": 1e-5, "bf16": 5e-4, "fp16": 1e-4}
NORMS = 10  # times that for gradient norms


@dataclasses.dataclass(frozen=True)
class SetUp:
    """A run of stage 2, or of stage 1 where `zero_stage` is None."""

    name: str
    precision: str
    zero_stage: int | None
    world: int
    parallel: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if self.zero_stage is None:
            return f"stage 1 (dVAE), {self.precision}, {self.world} rank"
        nodes = ", PowerSGD of rank 8 per shard in 1-6-9 between 2 nodes" if self.parallel else ""
        return f"stage 2, {self.precision}, ZeRO {self.zero_stage}, {self.world} ranks{nodes}"

    def config(self, folder: Path, **changes: object) -> Config:
        """Of a run below `folder`, whose inputs are written if they are not there."""
        train = TRAIN | {"precision": self.precision, "zero_stage": self.zero_stage or 0}
        tree = to_dict(tiny_run.make(folder, dict(self.parallel), **train))
        tree["dvae_train"] |= DVAE_TRAIN
        stage_1 = self.zero_stage is None
        tree["dvae_train" if stage_1 else "train"] |= changes
        tree["paths"]["dvae_run" if stage_1 else "run"] = str(folder / self.name)
        return from_dict(tree)


SET_UPS = (
    SetUp("fp32-zero2", "fp32", 2, 2),
    SetUp("fp32-zero0", "fp32", 0, 2),
    SetUp("fp32-zero3", "fp32", 3, 2),
    SetUp("bf16-zero2", "bf16", 2, 2),
    SetUp("fp16-zero2", "fp16", 2, 2),
    SetUp("fp16-powersgd-zero2", "fp16", 2, 4, POWERSGD),
    SetUp("fp16-powersgd-zero3", "fp16", 3, 4, POWERSGD),
    SetUp("dvae", "fp32", None, 1),
)


def losses(set_ups: Sequence[SetUp], folder: Path, **changes: object) -> dict[str, list[Row]]:
    """By name, of set-ups with the same number of ranks, which run one after the other."""
    write_images(folder / "images")
    runs = [(s.zero_stage is None, s.config(folder, **changes)) for s in set_ups]
    rows = run_distributed(run_all, set_ups[0].world, runs)[0]
    return {set_up.name: found for set_up, found in zip(set_ups, rows, strict=True)}


def run_all(ranks: Any, runs: Sequence[tuple[bool, Config]]) -> list[list[Row]]:
    """Of each run: train_dvae if the flag is set, else train."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for stage_1, config in runs:
            (train_dvae if stage_1 else train)(config)
    paths = [config.paths.dvae_run if stage_1 else config.paths.run for stage_1, config in runs]
    lines = [[line for line in read_log(Path(path)) if "loss" in line] for path in paths]
    return [[(x["step"], x["loss"], x["grad_norm"]) for x in log] for log in lines]


def write_images(folder: Path) -> None:
    """Waves of other lengths in each channel; no random numbers, no drawing, no resizing."""
    if folder.exists():
        return
    y, x = np.mgrid[:8, :8]
    for part, numbers in (("train", range(24)), ("held-out", range(24, 28))):
        with ShardWriter(str(folder / part), "images", {}, samples_per_shard=24) as writer:
            for i in numbers:
                wave = x * (1 + i % 3) + y * (i % 5) + i
                channels = [wave * speed % 256 for speed in (37, 53, 11)]
                buffer = io.BytesIO()
                Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(buffer, "PNG")
                writer.write(f"{i:02}", {"png": buffer.getvalue(), "txt": b"waves", "json": b"{}"})


def write(set_up: SetUp, rows: Sequence[Row]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [f"# {set_up}; step, loss in nats, gradient norm before clipping"]
    lines += [f"{step} {loss:.9g} {norm:.9g}" for step, loss, norm in rows]
    (FOLDER / f"{set_up.name}.txt").write_text("\n".join(lines) + "\n")


def read(set_up: SetUp) -> list[Row]:
    header, *lines = (FOLDER / f"{set_up.name}.txt").read_text().splitlines()
    assert header.startswith(f"# {set_up};"), "the file is of another set-up; write it anew"
    cells = [line.split() for line in lines]
    return [(int(step), float(loss), float(norm)) for step, loss, norm in cells]


def errors(rows: Sequence[Row], wanted: Sequence[Row]) -> list[tuple[float, float]]:
    """Of loss and gradient norm at each step, relative.

    Losses to the largest in size, as those of a dVAE pass through 0.
    """
    largest = max(abs(loss) for _, loss, _ in wanted)
    return [
        (abs(new[1] - old[1]) / largest, abs(new[2] / old[2] - 1))
        for new, old in zip(rows, wanted, strict=True)
    ]


def differences(set_up: SetUp, rows: Sequence[Row]) -> list[str]:
    """The steps that are further from the file than they may be, a line each."""
    wanted, rtol = read(set_up), RTOL[set_up.precision]
    if [row[0] for row in rows] != [row[0] for row in wanted]:
        return [f"{len(rows)} steps, not {len(wanted)}"]
    found = []
    for row, old, (loss, norm) in zip(rows, wanted, errors(rows, wanted), strict=True):
        if not (loss <= rtol and norm <= NORMS * rtol):
            found.append(f"{row}, not {old}: loss off by {loss:.1g}, norm by {norm:.1g}")
    return found


def of_world(world: int) -> list[SetUp]:
    return [set_up for set_up in SET_UPS if set_up.world == world]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Rows by set-up; all of as many ranks are run when the first of them is asked for."""
    found = {}

    def rows(set_up):
        if set_up.name not in found:
            folder = tmp_path_factory.mktemp(f"world{set_up.world}")
            found.update(losses(of_world(set_up.world), folder))
        return found[set_up.name]

    return rows


@pytest.mark.parametrize("set_up", SET_UPS, ids=lambda set_up: set_up.name)
def test_losses_are_those_of_the_file(trained, set_up):
    assert not differences(set_up, trained(set_up))


SMALL_CHANGES = {
    "fp32-zero2": [
        {"lr": 1.99e-3}, {"warmup": 3}, {"beta1": 0.899}, {"beta2": 0.959}, {"eps": 1e-6},
        {"weight_decay": 0.4}, {"clip": 1.79}, {"text_loss": 0.1251}, {"plateau_gain": 0.01},
    ],
    "bf16-zero2": [{"text_loss": 0.126}, {"beta2": 0.92}, {"beta1": 0.86}],
    "fp16-zero2": [{"text_loss": 0.1255}, {"beta2": 0.95}, {"clip": 1.7}],
    "fp16-powersgd-zero2": [{"text_loss": 0.1255}, {"beta2": 0.95}, {"clip": 1.7}],
    "fp16-powersgd-zero3": [{"text_loss": 0.1255}, {"beta2": 0.95}, {"clip": 1.7}],
    "dvae": [{"lr": 2.99e-3}, {"beta2": 0.998}, {"clip": 0.119}, {"kl_weight": 6.59}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_CHANGES)
def test_a_small_change_of_a_hyperparameter_is_seen(tmp_path, name):
    (set_up,) = (s for s in SET_UPS if s.name == name)
    for number, change in enumerate(SMALL_CHANGES[name]):
        rows = losses([set_up], tmp_path / str(number), **change)[name]
        assert differences(set_up, rows), f"{change} is not seen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the files anew")
    options = parser.parse_args()
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            found = losses(of_world(world), Path(folder))
        for set_up in of_world(world):
            rows = found[set_up.name]
            if options.write:
                write(set_up, rows)
            loss, norm = map(max, zip(*errors(rows, read(set_up)), strict=True))
            print(f"{set_up}: loss off by {loss:.1g}, norm by {norm:.1g}")


if __name__ == "__main__":
    main()
