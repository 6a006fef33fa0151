"""Stage 1 of the demo on a quiet machine and beside one other busy process: threads against ranks.

    python -m benchmarks.busy_machine

Steps per second of `train-dvae emoji` started as one process with a thread per core, as one
process with one thread, and as one rank per core with one thread each. The busy process is a loop
that takes one core all the time. On N cores of which one is taken, N - 1 are free: what is quoted
is the speed beside it per free core, as a share of the quiet speed per core.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.common import Measured, arguments, report
from dalle_dist.config import load
from dalle_dist.data.shards import ShardWriter
from dalle_dist.distributed import meeting

CORES = len(os.sched_getaffinity(0))
BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc-per-node", str(CORES), "--master-port"]
WINDOW = 10  # steps between two lines of the log
Line = dict[str, float]


def main() -> None:
    options = arguments(__doc__, rounds=5)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        rows = measure(Path(folder), options)
    report("busy_machine", load("emoji"), rows, options)


def measure(folder: Path, options: argparse.Namespace) -> list[Measured]:
    """All ways to start, quiet and beside a busy process, in turn."""
    speeds: dict[tuple[str, str], list[float]] = {}
    curves: dict[str, list[Line]] = {}
    steps = 2 * WINDOW if options.smoke else 8 * WINDOW
    for round_ in range(options.rounds):
        for name in STARTS:
            for load_name in ("quiet", "busy"):
                run = folder / f"{round_}-{name}-{load_name}".replace(" ", "-")
                with _busy() if load_name == "busy" else nullcontext():
                    curves[name] = _train(name, folder, run, steps)
                speeds.setdefault((name, load_name), []).append(_speed(curves[name]))
    check(curves)
    return figures(speeds)


def check(curves: dict[str, list[Line]]) -> None:
    """Exit unless all train the same model: later on, sums in another order lead elsewhere."""
    losses = {name: lines[0]["nll"] for name, lines in curves.items()}
    if max(losses.values()) - min(losses.values()) > 2e-3:
        sys.exit(f"not timed: losses after {WINDOW} steps differ: {losses}")


def figures(speeds: dict[tuple[str, str], list[float]]) -> list[Measured]:
    rows = []
    old = speeds[THREADS, "quiet"]
    for name in STARTS:
        quiet, busy = speeds[name, "quiet"], speeds[name, "busy"]
        share = [b / max(CORES - 1, 1) / (q / CORES) for b, q in zip(busy, quiet, strict=True)]
        rows += [
            Measured(name, "quiet", "steps/s", quiet),
            Measured(name, "beside one busy process", "steps/s", busy),
            Measured(name, "busy per free core / quiet per core", "x", share),
            Measured(
                name,
                f"quiet / {THREADS}",
                "x",
                [q / o for q, o in zip(quiet, old, strict=True)],
            ),
        ]
    return rows


THREADS, ALONE, RANKS = "one process, a thread per core", "one process, one thread", "rank per core"
STARTS = (THREADS, ALONE, RANKS)


def _train(name: str, folder: Path, run: Path, steps: int) -> list[Line]:
    """Lines of the log of `steps` steps."""
    command = ["-m", "dalle_dist", "train-dvae", "emoji", *_settings(folder, run, steps)]
    if name == RANKS:
        command = [*TORCHRUN, str(meeting.free_port()), *command]
    else:
        command = [sys.executable, *command]
    threads = str(CORES) if name == THREADS else "1"
    environment = os.environ | {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "images_per_s" in line]


def _settings(folder: Path, run: Path, steps: int) -> Sequence[str]:
    values = {
        "paths.images": folder / "images",
        "paths.dvae_run": run,
        "dvae_train.steps": steps,
        "dvae_train.warmup": WINDOW,
        "dvae_train.log_every": WINDOW,
        "dvae_train.eval_every": steps,
        "dvae_train.save_every": steps,
    }
    return [f"{key}={value}" for key, value in values.items()]


def _speed(lines: list[Line]) -> float:
    """Median steps per second, without the first window."""
    batch = load("emoji").dvae_train.batch_size
    return statistics.median(line["images_per_s"] / batch for line in lines[1:])


@contextmanager
def _busy() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def write_images(folder: Path) -> None:
    for part, count in (("train", 512), ("held-out", 16)):
        with ShardWriter(str(folder / part), "images", {}) as writer:
            for i in range(count):
                buffer = io.BytesIO()
                _image(i).save(buffer, format="PNG")
                files = {"png": buffer.getvalue(), "txt": b"a disc", "json": b"{}"}
                writer.write(f"{i:04d}", files)


def _image(i: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    color = (i * 37 % 256, i * 91 % 256, i * 53 % 256)
    ImageDraw.Draw(image).ellipse((i % 20, i % 17, 40 + i % 23, 45 + i % 19), fill=color)
    return image


if __name__ == "__main__":
    main()
