"""Cost of PowerSGD's arithmetic on one GPU's part of the 12B model's layers, against torch's hook.

A group of one process, so that all-reduces cost next to nothing; all else that both do in training
is in. torch's hook at its defaults (warm start, error feedback), and with two of its options. Rank
112 per shard; shards of 496x3968 (q, k, v, out) and 1984x3968 (MLP), which lie layer after layer in
one buffer, as under ZeRO-3 and in the hook's bucket. torch does not look for what is not finite: so
neither do we in the row to compare; a row with it stands beside.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd

from benchmarks import common
from benchmarks.common import Measured
from dalle_dist.config import Config, load
from dalle_dist.distributed import process_group
from dalle_dist.gradients.batches import Batcher
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd import sending
from dalle_dist.gradients.powersgd.algorithm import PowerSGD
from dalle_dist.gradients.powersgd.factored import FactoredMean
from dalle_dist.gradients.powersgd.options import PowerSGDOptions
from dalle_dist.gradients.powersgd.orthogonal import (
    gaussian_RN,
    householder_BMR,
    orthonormal_BMR,
)
from dalle_dist.gradients.powersgd.sending import Wave

LOCAL_WORLD_SIZE, RANK, LAYERS = 8, 112, 4
SHARDS = 6  # of a layer
OURS = {"ours": False, "ours, with its finite check": True}
HOOKS: dict[str, dict[str, bool]] = {
    "torch hook": {},
    "torch hook, shapes batched": {"batch_tensors_with_same_shape": True},
    "torch hook, Q drawn anew": {"warm_start": False},
}
FLOP = 6  # of a step per weight and token; recomputation would make it 8


@dataclass
class Bucket:
    """What torch's hook asks of DDP's bucket, which only C++ can make."""

    flat: Tensor
    shapes: list[tuple[int, int]]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        parts = self.flat.split([rows * columns for rows, columns in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def main() -> None:
    options = common.arguments(__doc__, rounds=15)
    ranks = process_group.init()
    config = load("12b", ["name=smoke"] if options.smoke else [])
    width, rank = (256, 8) if options.smoke else (config.transformer.width, RANK)
    times = in_turn(layers(width), rank, options.rounds, options.threads)
    rows = figures(times)
    rows += orthogonalisation(width // 2, rank, ranks.device, options.rounds)
    rows.append(Measured("12B on paper", "share of a step's FLOP", "%", [100 * share(config)]))
    common.report("powersgd_math", config, rows, options, ranks.device)
    process_group.shutdown()


def layers(width: int) -> list[tuple[int, int]]:
    """Shards of attention's and of the MLP's matrices, cut along dim 0; `down` lies as [4d, d]."""
    rows = width // LOCAL_WORLD_SIZE
    return ([(rows, width)] * 4 + [(4 * rows, width)] * 2) * LAYERS


def in_turn(
    shapes: list[tuple[int, int]], rank: int, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of each case, each in a process of its own that waits while another is timed.

    In one process torch's hook would slow the others down: it computes in the callbacks' thread,
    whose OpenMP workers go on spinning beside those of the main thread.
    """
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    for name in (*OURS, *HOOKS):
        ends[name], other = context.Pipe()
        arguments = (other, name, shapes, rank, threads)
        processes.append(context.Process(target=_case, args=arguments, daemon=True))
        processes[-1].start()
    for end in ends.values():
        if refusal := end.recv():
            raise SystemExit(refusal)
    times: dict[str, list[float]] = {name: [] for name in ends}
    for timed in range(rounds + 1):
        for name, end in ends.items():
            end.send(True)
            took = end.recv()
            if timed:
                times[name].append(took)
    for end in ends.values():
        end.send(False)
    for process in processes:
        process.join()
    return times


def _case(
    end: Connection, name: str, shapes: list[tuple[int, int]], rank: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    device = process_group.init().device
    try:
        if name in OURS:
            check_ours(shapes, rank, device)
            run = ours(shapes, rank, device, OURS[name])[0]
        else:
            check_theirs(shapes, rank, device, **HOOKS[name])
            run = theirs(shapes, rank, device, **HOOKS[name])[0]
    except SystemExit as refusal:
        end.send(str(refusal))
        return
    end.send("")
    while end.recv():
        end.send(common.seconds(run))
    # Not by shutdown: the hook's thread may still hold the process group, and cannot end itself.
    os._exit(0)


def ours(
    shapes: list[tuple[int, int]], rank: int, device: torch.device, check: bool = True
) -> tuple[Callable[[], None], list[Tensor], PowerSGD]:
    count = -(-len(shapes) // SHARDS)
    sgd = PowerSGD(dist.group.WORLD, blocks=count, rank=rank, device=device)
    values = Bucket(gradient(shapes, device), shapes).gradients()
    shards = [
        Piece(f"layers.{i // SHARDS}.{'abcdef'[i % SHARDS]}", 0, value, block=i // SHARDS)
        for i, value in enumerate(values)
    ]
    if not check:
        nothing = torch.zeros(count + 1, dtype=torch.float64, device=device)
        sending.broken_gradients = lambda *_: nothing  # type: ignore[assignment]

    def run() -> None:
        sgd.reduce(shards)
        _synchronise(device)

    return run, values, sgd


def theirs(
    shapes: list[tuple[int, int]], rank: int, device: torch.device, **options: bool
) -> tuple[Callable[[], None], list[Tensor], torch_powersgd.PowerSGDState]:
    # Errors and a warm start need a start after step 1.
    state = torch_powersgd.PowerSGDState(
        dist.group.WORLD, rank, start_powerSGD_iter=2, min_compression_rate=1, **options
    )
    state.iter = 2
    bucket = Bucket(gradient(shapes, device), shapes)

    def run() -> None:
        torch_powersgd.powerSGD_hook(state, bucket).wait()
        _synchronise(device)

    return run, bucket.gradients(), state


def gradient(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(sum(rows * columns for rows, columns in shapes)).to(device)


def check_ours(shapes: list[tuple[int, int]], rank: int, device: torch.device) -> None:
    """Refuse to time outputs that are not the projection they should be, or that lose something."""
    run, values, sgd = ours(shapes, rank, device)
    given = [value.clone() for value in values]
    run()
    names = [f"layers.{i // SHARDS}.{'abcdef'[i % SHARDS]}@0" for i in range(len(shapes))]
    errors = [sgd.errors()[name] for name in names]
    q = gaussian_RN(0, names[0], rank, shapes[0][1]).to(device).double().T
    basis, _ = torch.linalg.qr(given[0].double() @ q)
    _require("our output", values[0], basis @ (basis.T @ given[0].double()))
    for value, error, whole in zip(values, errors, given, strict=True):
        _require("our output + error", value + error, whole)


def check_theirs(
    shapes: list[tuple[int, int]], rank: int, device: torch.device, **options: bool
) -> None:
    run, values, state = theirs(shapes, rank, device, **options)
    given = [value.clone() for value in values]
    run()
    errors = Bucket(state.error_dict[0], shapes).gradients()
    for value, error, whole in zip(values, errors, given, strict=True):
        _require("torch's output + error", value + error, whole)


def figures(times: dict[str, list[float]]) -> list[Measured]:
    rows = [
        Measured(name, "layer shards", "ms", [1e3 * t / LAYERS for t in took])
        for name, took in times.items()
    ]
    for name in HOOKS:
        for mine in OURS:
            pairs = zip(times[mine], times[name], strict=True)
            rows.append(Measured(f"/ {name}", f"{mine}, layer", "x", [o / t for o, t in pairs]))
    return rows


def orthogonalisation(rows: int, rank: int, device: torch.device, rounds: int) -> list[Measured]:
    """Our basis, ours where that fails, and CholeskyQR2 in fp32: time, and how orthonormal."""
    torch.manual_seed(0)
    p_BMR = torch.randn(LAYERS, rows, rank).to(device)
    turned = torch.linalg.qr(torch.randn(rank, rank))[0]
    graded = p_BMR @ (torch.logspace(0, -5, rank)[:, None] * turned).to(device)
    bases: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda p: orthonormal_BMR(p)[0],
        "ours, Householder": householder_BMR,
        "CholeskyQR2 in fp32": cholesky_qr2,
    }
    times = common.interleaved(
        {name: lambda f=f: (f(p_BMR), _synchronise(device)) for name, f in bases.items()}, rounds
    )
    found = [
        Measured(name, f"QR of {LAYERS} x {rows}x{rank}", "ms", [1e3 * t for t in took])
        for name, took in times.items()
    ]
    for name, basis in bases.items():
        for kind, given in (("Gaussian", p_BMR), ("condition 1e5", graded)):
            found.append(Measured(name, f"max |PtP - I|, {kind}", "", [worst(basis(given))]))
    return [*found, *in_training(rank, device)]


def in_training(rank: int, device: torch.device, steps: int = 20) -> list[Measured]:
    """Over steps with error feedback: how orthonormal bases are, how many Cholesky does not give.

    Gradients of a decaying spectrum that change little from step to step.
    """
    rows = []
    for warm in (False, True):
        torch.manual_seed(0)
        options = PowerSGDOptions(warm_start=warm)
        sgd = PowerSGD(dist.group.WORLD, blocks=1, rank=rank, device=device, options=options)
        batcher, left = Batcher(1, device), torch.randn(4 * rank, 4 * rank)
        left *= torch.logspace(0, -4, 4 * rank)
        right, bases, failed = torch.randn(4 * rank, 8 * rank), [], 0.0
        for _ in range(steps):
            noise = 1e-3 * torch.randn(4 * rank, 8 * rank)
            batches = batcher([Piece("w", 0, (left @ right + noise).to(device), 0)])
            sent = sgd.begin([Wave(batches, [])])
            sent.send_all(torch.ones(2, device=device))
            (mean,) = sent.means
            assert isinstance(mean, FactoredMean)
            failed += float(mean.unsound())
            nonfinite, _ = sent.agree()
            bases.append(worst(mean.factors[0].basis_BMR))
            sgd.finish(sent, nonfinite, skip=False, measure=False)
        case = "ours, warm start" if warm else "ours"
        rows.append(Measured(case, f"max |PtP - I|, {steps} steps", "", bases))
        rows.append(Measured(case, f"by Householder, {steps} steps", "", [failed]))
    return rows


def worst(basis_BMR: Tensor) -> float:
    """Largest element of |P^T P - I|."""
    basis_BMR = basis_BMR.double()
    gram = basis_BMR.mT @ basis_BMR
    found = (gram - torch.eye(gram.shape[-1]).to(gram)).abs().max()
    return float(found.nan_to_num(math.inf))


def cholesky_qr2(p_BMR: Tensor) -> Tensor:
    """Breaks down above condition 1e3 or so."""
    for _ in range(2):
        factor, _ = torch.linalg.cholesky_ex(p_BMR.mT @ p_BMR)
        p_BMR = torch.linalg.solve_triangular(factor.mT, p_BMR, upper=True, left=False)
    return p_BMR


def share(config: Config) -> float:
    """FLOP of PowerSGD per FLOP of the step that it serves, on one of the paper's 1,024 GPUs.

    The step: one sample per GPU, weights of the resblocks alone.
    """
    shape = config.transformer
    shards = layers(shape.width)[:SHARDS]
    products = sum(3 * 2 * rows * columns * RANK for rows, columns in shards)
    # Twice a Gram matrix of 2 m r^2 and a triangular solve of m r^2.
    factors = sum(2 * 3 * rows * RANK**2 for rows, _ in shards)
    step = FLOP * 12 * shape.width**2 * shape.tokens
    return (products + factors) / step


def _require(what: str, found: Tensor, wanted: Tensor) -> None:
    error, size = (found.double() - wanted.double()).norm(), wanted.double().norm()
    if not error <= 1e-5 * size:
        raise SystemExit(f"{what} differs by {error:.2g} of {size:.2g}: not timed")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
