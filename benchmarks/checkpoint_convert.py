"""A checkpoint to a file of weights: ours, and the same state in DeepSpeed's folder by its script.

    python -m benchmarks.checkpoint_convert --gigabytes 4

Random fp32 weights in the matrices of a transformer, with both moments, as two ranks of ZeRO-2
wrote them: in our format, and exported to DeepSpeed's. Each conversion to safetensors is a process
of its own that has imported what it needs; timed is the conversion alone, and its memory is the
highest above what the imports took, with and without the pages of mapped files. Files lie in the
page cache before the first round. Ours reads the files of weights twice, the first time to compare
their hashes, and has the disk confirm what it wrote. DeepSpeed does neither; a case of it adds the
latter. Before anything is timed all must give the same tensors, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import Measured
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.export import deepspeed
from dalle_dist.checkpoint.export.training_state import Group
from dalle_dist.checkpoint.manifest import FileEntry, Manifest, file_name, read_manifest
from dalle_dist.checkpoint.names import MANIFEST
from dalle_dist.checkpoint.tensor_file import TensorFile
from dalle_dist.engine.interface import STATE

WIDTH, SMOKE_WIDTH = 3584, 64
RANKS = 2
FLUSHED = "deepspeed, flushed"
_OURS = """
from dalle_dist.checkpoint.convert import weights_of
from dalle_dist.checkpoint.formats import save_tensors
from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.checkpoint.tensor_file import digest

def convert(checkpoint, out):
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.of_kind("weights").items():
        if digest(Path(checkpoint) / name) != entry.xxh3:
            raise SystemExit(f"{name} is damaged")
    save_tensors(f"{out}/model.safetensors", weights_of(checkpoint, manifest, "raw"))
"""
_DEEPSPEED = """
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
import torch.distributed.tensor

def convert(checkpoint, out):
    convert_zero_checkpoint_to_fp32_state_dict(checkpoint, out, safe_serialization=True)
"""
# As ours does: a file that is only in the page cache is gone when the machine fails.
_FLUSH = """
write_only = convert

def convert(checkpoint, out):
    import os
    write_only(checkpoint, out)
    for path in Path(out).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
"""
PROGRAMS = {"ours": _OURS, "deepspeed": _DEEPSPEED, FLUSHED: _DEEPSPEED + _FLUSH}
_MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
{convert}
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

anonymous, done = [], threading.Event()
def watch():
    while not done.wait(0.005):
        anonymous.append(status("RssAnon"))

torch.set_num_threads(int(sys.argv[3]))
before = status("VmRSS"), status("RssAnon")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2])
took = time.perf_counter() - start
anonymous.append(status("RssAnon"))
done.set()
print(json.dumps([took, status("VmHWM") - before[0], max(anonymous) - before[1]]))
"""
Outcome = tuple[float, float, float]  # seconds, bytes of memory, bytes that are no mapped file


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="of fp32 weights (%(default)s)"
    )
    parser.add_argument(
        "--ours-alone", action="store_true", help="for sizes that the others' memory does not hold"
    )
    options = common.arguments(__doc__, rounds=3, parents=[parser])
    width = SMOKE_WIDTH if options.smoke else WIDTH
    size = 1e6 if options.smoke else options.gigabytes * 1e9
    shapes = dict(_shapes(width, size))
    config = replace(common.benchmark_config(options.smoke), name=f"w{width}-{len(shapes)}-tensors")
    with tempfile.TemporaryDirectory(prefix="dalle-dist-benchmark-") as folder:
        rows = _rows(Path(folder), shapes, options)
    common.report("checkpoint", config, rows, options)


def _shapes(width: int, size: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Matrices and biases of transformer layers until they take `size` bytes in fp32."""
    done = 0.0
    for layer in itertools.count():
        for name, rows, columns in (
            ("attention.qkv", 3, 1), ("attention.out", 1, 1), ("mlp.up", 4, 1), ("mlp.down", 1, 4),
        ):  # fmt: skip
            if done >= size:
                return
            yield f"layers.{layer}.{name}.weight", (rows * width, columns * width)
            yield f"layers.{layer}.{name}.bias", (rows * width,)
            done += 4 * rows * width * (columns * width + 1)


def _rows(
    folder: Path, shapes: dict[str, tuple[int, ...]], options: argparse.Namespace
) -> list[Measured]:
    kinds = STATE[:1] if options.ours_alone else STATE
    checkpoint, theirs = _write(folder, shapes, kinds), str(folder / "deepspeed")
    programs = {"ours": PROGRAMS["ours"]} if options.ours_alone else PROGRAMS
    if not options.ours_alone:
        options_of_groups = {"lr": 1e-3, "betas": (0.9, 0.96), "eps": 1e-6, "weight_decay": 0.05}
        groups = [Group(shapes, options_of_groups)]
        deepspeed.write(checkpoint, read_manifest(checkpoint), theirs, groups=groups)
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    found: dict[str, list[Outcome]] = {case: [] for case in programs}
    for timed in range(options.rounds + 1):
        for case in programs:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                outcome = _converted(
                    case, checkpoint if case == "ours" else theirs, out, options.threads
                )
                if timed:
                    found[case].append(outcome)
                else:
                    _require_same(Path(out), checkpoint, shapes)
    return list(_measured(found, size))


def _measured(found: dict[str, list[Outcome]], size: int) -> Iterator[Measured]:
    for case, outcomes in found.items():
        yield Measured(case, "to safetensors", "s", [outcome[0] for outcome in outcomes])
        for number, metric in ((1, "memory"), (2, "memory without mapped files")):
            shares = [outcome[number] / size for outcome in outcomes]
            yield Measured(case, f"{metric} / fp32 weights", "x", shares)
    for case in (name for name in found if name != "ours"):
        pairs = list(zip(found[case], found["ours"], strict=True))
        yield Measured(case, "its time / ours", "x", [d[0] / o[0] for d, o in pairs])
        yield Measured(case, "its memory / ours", "x", [d[1] / o[1] for d, o in pairs])


def _write(folder: Path, shapes: dict[str, tuple[int, ...]], kinds: Sequence[str]) -> str:
    """A checkpoint of ours; each tensor is cut in two, as ranks cut them."""
    checkpoint, files = Path(store.step_folder(str(folder), 1)), {}
    checkpoint.mkdir()
    for number, kind in enumerate(kinds):
        for rank in range(RANKS):
            name = file_name(kind, rank)
            files[name] = _write_file(checkpoint / name, shapes, rank, number)
    layout = {"ranks": RANKS, "nodes": 1, "zero_stage": 2, "precision": "fp32"}
    training = {"shapes": shapes, "optimizer_steps": 1, "stage": "transformer"}
    manifest = Manifest(1, layout, {}, training, {}, files)
    (checkpoint / MANIFEST).write_bytes(manifest.encoded())
    return str(checkpoint)


def _write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], rank: int, number: int
) -> FileEntry:
    pieces = {}
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        first, last = (numel * r // RANKS for r in (rank, rank + 1))
        pieces[f"{name}@{first}"] = last - first
    torch.manual_seed(RANKS * number + rank)
    with TensorFile(path, {key: (torch.float32, (n,)) for key, n in pieces.items()}) as file:
        for key in sorted(pieces):
            file.begin(key)
            file.add(torch.rand(pieces[key]))
    written = file.written
    return FileEntry(written.bytes, written.xxh3, pieces)


def _converted(case: str, source: str, out: str, threads: int) -> Outcome:
    """Of a fresh process, memory above what its imports took."""
    program = _MEASURE.format(convert=PROGRAMS[case])
    command = [sys.executable, "-c", program, source, out, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr}")
    took, memory, anonymous = json.loads(done.stdout.splitlines()[-1])
    return took, memory, anonymous


def _require_same(out: Path, checkpoint: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises SystemExit: other tensors than in the checkpoint."""
    from dalle_dist.checkpoint.convert import weights_of
    from dalle_dist.checkpoint.formats import load_tensors

    state, seen = weights_of(checkpoint, read_manifest(checkpoint), "raw"), set()
    for file in out.glob("*.safetensors"):
        for name, tensor in sorted(load_tensors(file).items()):
            if not torch.equal(tensor, state[name]):
                raise SystemExit(f"{file}: {name} is not that of the checkpoint")
            seen.add(name)
    if seen != shapes.keys():
        raise SystemExit(f"{out}: {len(seen)} tensors of {len(shapes)}")


if __name__ == "__main__":
    main()
