"""What each part of the demo's recipe brings, over seeds: one part is changed at a time.

    python -m benchmarks.recipe FOLDER                         hours; FOLDER keeps what is done
    python -m benchmarks.recipe FOLDER --seeds 1 --only "image noise 0"
    python -m benchmarks.recipe ANOTHER --images data/glyphs --stages 1   other images

Runs are of preset `emoji`, one process of one thread each, `--jobs` at once; on the GPU if there is
one. Stage 1's cases are whole runs. Stage 2's see 19,200 images, a third of the demo's, and stand
on the codes of the preset's stage 1 with seed 0, or of the case that they name. Guidance is
measured on the runs of the preset. Runs that failed are counted in a row of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import guidance
from benchmarks.common import Measured, report
from dalle_dist.config import load
from dalle_dist.distributed.process_group import device_of
from dalle_dist.train.run import read_log

IMAGES = 19_200  # that a run of stage 2 sees, a third of the demo's
FALLS = (0.55, 0.72, 0.83, 0.92, 0.97)  # shares of a run after which its rate is halved
PRESET, PAPER = "preset", "nll_beta 0, as in the paper"


@dataclass(frozen=True)
class Case:
    """One change of the preset. `codes` names the case of stage 1 whose codes are trained on."""

    name: str
    overrides: Sequence[str] = ()
    codes: str = PRESET


def stage_2_length(batch_size: int, lr: float, images: int = IMAGES) -> list[str]:
    """A run that sees `images` images in batches of this size; its warm-up sees 1,600 of them."""
    steps = images // batch_size
    falls = [max(1, round(share * steps)) for share in FALLS]
    return [
        f"train.batch_size={batch_size}",
        f"train.micro_batch={batch_size}",
        f"train.steps={steps}",
        f"train.lr={lr}",
        f"train.warmup={min(steps, max(1, 1_600 // batch_size))}",
        f"train.halve_at={falls}",
        f"train.eval_every={steps}",
        f"train.sample_every={steps}",
        f"train.save_every={steps}",
        "train.metrics=[losses]",
    ]


STAGE_1 = (
    Case(PRESET),
    Case(PAPER, ["dvae_train.nll_beta=0"]),
    Case("not clipped", ["dvae_train.clip=0"]),
    Case("KL weight rises over 900 steps", ["dvae_train.kl_steps=900"]),
)
STAGE_2 = (
    Case(PRESET),
    Case("embeddings not scaled", ["transformer.scale_embeddings=false"]),
    Case("image noise 0", ["train.image_noise=0"]),
    Case("batches of 64", stage_2_length(64, 1.5e-3)),
    Case(f"codes of: {PAPER}", codes=PAPER),
)


def main() -> None:
    options = _arguments()
    folder: Path = options.folder
    _provide_images(folder, options.images)
    stages = {1: _stage_1, 2: _stage_2}
    rows = [row for stage in options.stages for row in stages[stage](folder, options)]
    report("recipe", load("emoji"), rows, options, device_of())


def _provide_images(folder: Path, other: Path | None) -> None:
    """FOLDER/data: emoji, or a link to other image shards."""
    data = folder / "data"
    if other and not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data.symlink_to(other.resolve())
    elif other and data.resolve() != other.resolve():
        sys.exit(f"{data}: holds other images than {other}; choose another FOLDER")
    elif not (data / "held-out").exists():
        _dalle_dist(["data", "emoji", str(data), "--size", "64"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for data and runs; gigabytes")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each case (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (%(default)s)")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--images", type=Path, help="image shards; FOLDER is then of these alone")
    parser.add_argument("--smoke", action="store_true", help="tiny runs; proves that it runs")
    parser.add_argument("--out", type=Path, help="CSV file to append to, not benchmarks/results/")
    return parser.parse_args()


def _stage_1(folder: Path, options: argparse.Namespace) -> list[Measured]:
    cases = [case for case in STAGE_1 if not options.only or case.name in options.only]
    needed = {case.codes for case in STAGE_2 if not options.only or case.name in options.only}
    runs = [(case, seed) for case in cases for seed in range(options.seeds)]
    runs += [(case, 0) for case in STAGE_1 if case.name in needed and case not in cases]
    lengths = [f"dvae_train.{key}=4" for key in ("steps", "warmup", "eval_every", "save_every")]

    def train(run: tuple[Case, int]) -> bool:
        case, seed = run
        settings = [*_paths(folder, case.name, seed), *case.overrides, f"seed={seed}"]
        settings += lengths if options.smoke else []
        return _trained("train-dvae", _dvae(folder, case.name, seed), settings)

    went_well = _at_once(train, runs, options.jobs)
    found = {
        case.name: [
            {name: _last(_dvae(folder, case.name, seed))[name] for name in UNITS_1}
            for seed in range(options.seeds)
            if went_well[case.name, seed]
        ]
        for case in cases
    }
    return _rows("stage 1", found, UNITS_1, options)


def _stage_2(folder: Path, options: argparse.Namespace) -> list[Measured]:
    cases = [case for case in STAGE_2 if not options.only or case.name in options.only]
    for case in cases:
        settings = _paths(folder, case.codes)
        _dalle_dist(["encode", "emoji", *settings])
        if not (folder / "tokenizer.json").exists():
            _dalle_dist(["tokenizer", "train", "emoji", *settings])
    length = stage_2_length(16, load("emoji").train.lr, 64 if options.smoke else IMAGES)
    runs = [(case, seed) for case in cases for seed in range(options.seeds)]

    def train(run: tuple[Case, int]) -> bool:
        case, seed = run
        path = _run(folder, case, seed)
        settings = [*_paths(folder, case.codes, run=path), *length, *case.overrides, f"seed={seed}"]
        return _trained("train", path, settings)

    went_well = _at_once(train, runs, options.jobs)
    default = load("emoji").sampling.guidance
    found: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    asked: list[tuple[str, list[str], float]] = []
    for case, seed in runs:
        if went_well[case.name, seed]:
            settings = [*_paths(folder, case.codes, run=_run(folder, case, seed)), f"seed={seed}"]
            for weight in guidance.WEIGHTS if case.name == PRESET else (default,):
                name = case.name if weight == default else f"guidance {weight:g}"
                asked.append((name, settings, weight))
    # Threads of one process wait for one another: processes of one thread each, as in training.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (1,)) as pool:
        jobs = [
            (name, pool.submit(guidance.figures, load("emoji", settings), weight))
            for name, settings, weight in asked
        ]
        for name, job in jobs:
            found.setdefault(name, []).append(job.result())
    return _rows("stage 2", found, guidance.UNITS, options)


UNITS_1 = {"psnr": "dB", "ssim": "", "codes_in_use": "share", "codes_perplexity": "codes"}


def _rows(
    stage: str,
    found: Mapping[str, Sequence[Mapping[str, float]]],
    units: Mapping[str, str],
    options: argparse.Namespace,
) -> list[Measured]:
    rows = []
    if options.images:
        stage = f"{stage} on {options.images.name}"
    for name, runs in found.items():
        missing = options.seeds - len(runs)
        failed = [float(missing)] if missing else []
        rows += [Measured(f"{stage}: {name}", "runs that failed", "", failed)] if failed else []
        rows += guidance.measured(f"{stage}: {name}", runs, units) if runs else []
    return rows


def _paths(folder: Path, codes: str, seed: int = 0, run: Path | None = None) -> list[str]:
    """Of a run on, or of, the stage 1 of case `codes` with this seed."""
    values = {
        "images": folder / "data",
        "tokenizer": folder / "tokenizer.json",
        "dvae_run": _dvae(folder, codes, seed),
        "tokens": folder / "tokens" / _slug(codes),
        "run": run or folder / "runs",
    }
    return [f"paths.{key}={value}" for key, value in values.items()]


def _dvae(folder: Path, case: str, seed: int) -> Path:
    return folder / "dvae" / f"{_slug(case)}-{seed}"


def _run(folder: Path, case: Case, seed: int) -> Path:
    return folder / "runs" / f"{_slug(case.name)}-{seed}"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)


def _trained(verb: str, run: Path, settings: Sequence[str]) -> bool:
    """Whether the run is whole; one that was cut off before goes on."""
    if (run / "release" / "config.yaml").exists():
        return True
    resume = ["--resume", "auto"] if (run / "config.yaml").exists() else []
    done = _start([verb, "emoji", *resume, *settings])
    print(f"{run}: {'done' if not done.returncode else done.stderr[-500:]}", flush=True)
    return not done.returncode


def _dalle_dist(arguments: Sequence[str]) -> None:
    done = _start(arguments)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")


def _start(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dalle_dist", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _at_once(
    train: Callable[[tuple[Case, int]], bool], runs: Sequence[tuple[Case, int]], jobs: int
) -> dict[tuple[str, int], bool]:
    """Which runs went well, by name of the case and seed."""
    names = [(case.name, seed) for case, seed in runs]
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(names, pool.map(train, runs), strict=True))


def _last(run: Path) -> dict[str, Any]:
    """The last evaluation of a run of stage 1."""
    return [line for line in read_log(run) if "psnr" in line][-1]


if __name__ == "__main__":
    main()
