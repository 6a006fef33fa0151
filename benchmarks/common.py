"""What the benchmarks share: the model they measure, timing, and CSV rows that say where.

Columns of a row: `median`, `low` and `high` of `runs` timed rounds, in `unit`; `case` is what was
measured, `metric` of it. Rows of 2026-11-25 and before call an optimizer step an update.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dalle_dist
from dalle_dist.config import Config, from_dict
from dalle_dist.transformer.model import Transformer

RESULTS = Path(__file__).parent / "results"
FIGURE = ("case", "metric", "unit", "median", "low", "high", "runs")
COLUMNS = ("time", *FIGURE, "config", "hardware", "threads", "python", "torch", "package")


@dataclass(frozen=True)
class Measured:
    """One figure: the median of `values`, with their range as its spread."""

    case: str
    metric: str
    unit: str
    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        spread = f"  ({min(self.values):,.4g} to {max(self.values):,.4g})"
        return f"{self.case:36}{self.metric:36}{self.median:>10,.4g} {self.unit}" + (
            spread if len(self.values) > 1 else ""
        )


def arguments(
    text: str | None, rounds: int, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.Namespace:
    """--smoke, --rounds, --threads, --out, and those of `parents`; sets torch's threads."""
    parser = argparse.ArgumentParser(description=text, parents=list(parents))
    parser.add_argument("--smoke", action="store_true", help="a tiny model; proves that it runs")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (%(default)s)")
    parser.add_argument("--out", type=Path, help="CSV file to append to, not benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def benchmark_config(smoke: bool) -> Config:
    """d=256, 4 layers, 4 heads of 64, 256 + 1024 tokens, vocabularies 16,384 and 8,192, fp32."""
    wide = {"width": 256, "heads": 4, "layers": 4, "text_tokens": 256, "image_grid": 32}
    tiny = {
        "width": 64,
        "heads": 1,
        "layers": 2,
        "text_tokens": 16,
        "image_grid": 12,
        "codebook_size": 32,
    }
    return from_dict(
        {
            "name": "smoke" if smoke else "d256-l4",
            "tokenizer": {"vocab_size": 300 if smoke else 16_384},
            "dvae": {"image_size": 96 if smoke else 256, "codebook_size": 32 if smoke else 8_192},
            "transformer": {**(tiny if smoke else wide), "conv_kernel": 3 if smoke else 11},
            "train": {"precision": "fp32", "checkpoint_activations": False},
        }
    )


def benchmark_model(config: Config) -> Transformer:
    """The transformer with unembeddings that are not zero, so that no gradient is zero."""
    torch.manual_seed(0)
    model = Transformer(config)
    for head in (model.text_unembedding, model.image_unembedding):
        nn.init.normal_(head.weight, std=0.02)
    return model


def random_batch(config: Config, batch: int) -> tuple[Tensor, Tensor]:
    """Captions that fill the text block (no pads: every rival does the same work), and codes."""
    shape = config.transformer
    text_BT = torch.randint(2, config.tokenizer.vocab_size, (batch, shape.text_tokens))
    codes_BN = torch.randint(config.transformer.codebook_size, (batch, shape.image_tokens))
    return text_BT, codes_BN


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[Callable[[], Any]], float] = seconds,
) -> dict[str, list[float]]:
    """Seconds of each case by `clock`, `rounds` times in turn after one unmeasured round.

    In turn, so that what else the machine does falls on all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for timed in range(rounds + 1):
        for name, run in cases.items():
            took = clock(run)
            if timed:
                times[name].append(took)
    return times


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that torch's CPU allocator hands out at most at a time during `run`."""
    run()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    log = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted(log, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def gemm_peak(size: int = 2048, runs: int = 9) -> Measured:
    """fp32 GFLOP/s of torch's square matrix product on this machine, now."""
    a, b = torch.randn(2, size, size)
    times = [seconds(lambda: a @ b) for _ in range(runs)]
    return Measured("torch.mm", "GEMM peak", "GFLOP/s", [2e-9 * size**3 / t for t in times])


def report(
    name: str,
    config: Config,
    rows: Sequence[Measured],
    options: argparse.Namespace,
    device: torch.device | str = "cpu",
) -> None:
    """Print the figures; append them to results/NAME.csv, or with --smoke only to --out.

    `device` is where they were measured.
    """
    for row in rows:
        print(row)
    path = options.out or (None if options.smoke else RESULTS / f"{name}.csv")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(_cells(row) | _environment(config, device))
    print(f"-> {path}")


def _cells(row: Measured) -> dict[str, str | int]:
    return {
        "case": row.case,
        "metric": row.metric,
        "unit": row.unit,
        "median": f"{row.median:.5g}",
        "low": f"{min(row.values):.5g}",
        "high": f"{max(row.values):.5g}",
        "runs": len(row.values),
    }


def _environment(config: Config, device: torch.device | str) -> dict[str, str | int]:
    return {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "config": config.name,
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "package": dalle_dist.__version__,
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor() or platform.machine()


def hardware(device: torch.device | str) -> str:
    """The CPU; or the first GPU, and the versions of what its code is compiled by."""
    if torch.device(device).type != "cuda":
        return _cpu()
    name, triton = torch.cuda.get_device_name(), version_of("triton")
    return f"{name}, CUDA {torch.version.cuda}, triton {triton}"


def version_of(package: str) -> str:
    """Installed version, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
