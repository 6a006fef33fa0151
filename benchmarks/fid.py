"""From the features of two sets of images to their FID: ours against the formulas of others.

10,000 images each, 2,048 features, which are given: what Inception takes is the same for all.
torch-fidelity itself is not installed here; its formula is restated from its repository, as are
those of pytorch-fid and clean-fid: numpy's covariance, then the eigenvalues of the product of the
covariances, or scipy's root of it. The exact distance is that of the features, of which no
covariance is formed. numpy and scipy take OMP_NUM_THREADS threads, torch those of --threads.
Processor time, so that a busy machine does not blur what takes minutes; with one thread it is what
a quiet one would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Measured
from dalle_dist.evaluation.frechet import frechet_distance
from dalle_dist.evaluation.moments import Moments

BATCH = 500  # images, as an evaluation hands them over
RTOL = 1e-5  # FIDs are told to two decimals
INSTALL = "fid: scipy is missing: pip install -c constraints.txt scipy"
Distance = Callable[[Tensor, Tensor], float]


def main() -> None:
    options = common.arguments(__doc__, rounds=3)
    images, dim = (300, 64) if options.smoke else (10_000, 2_048)
    config = replace(common.benchmark_config(options.smoke), name=f"n{images}-d{dim}")
    sets = features(images, dim, seed=0), features(images, dim, seed=1)
    found = check(contenders(), *sets)
    times = common.interleaved(
        {name: lambda run=run: run(*sets) for name, run in contenders().items()},
        options.rounds,
        cpu_seconds,
    )
    common.report("fid", config, figures(times, found), options)


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def contenders() -> dict[str, Distance]:
    return {
        "ours": ours,
        f"torch-fidelity: numpy {np.__version__} eigvals": by_eigenvalues,
        f"pytorch-fid: scipy {scipy_version()} sqrtm": by_root,
    }


def scipy_version() -> str:
    version = common.version_of("scipy")
    if version == "absent":
        raise SystemExit(INSTALL)
    return version


def features(images: int, dim: int, seed: int) -> Tensor:
    """Correlated, not negative, and of very different sizes, as those of Inception are: [N, D]."""
    generator = torch.Generator().manual_seed(0)
    mixing_DD = torch.randn(dim, dim, generator=generator) / dim**0.5
    size_D = torch.arange(1, dim + 1) ** -0.5
    generator.manual_seed(seed + 1)
    drawn_ND = torch.randn(images, dim, generator=generator) + 0.1 * seed
    return (drawn_ND * size_D @ mixing_DD + 0.1).relu()


def ours(first_ND: Tensor, second_ND: Tensor) -> float:
    gaussians = []
    for features_ND in (first_ND, second_ND):
        moments = Moments(features_ND.shape[1])
        for features_BD in features_ND.split(BATCH):
            moments.add(features_BD)
        gaussians.append(moments.gaussian())
    return frechet_distance(*gaussians)


def by_eigenvalues(first_ND: Tensor, second_ND: Tensor) -> float:
    shift, first, second = _numpy_moments(first_ND, second_ND)
    roots = np.sqrt(np.linalg.eigvals(first.dot(second)).astype(complex)).real.sum()
    return float(shift.dot(shift) + np.trace(first) + np.trace(second) - 2 * roots)


def by_root(first_ND: Tensor, second_ND: Tensor) -> float:
    from scipy.linalg import sqrtm

    shift, first, second = _numpy_moments(first_ND, second_ND)
    trace = np.trace(sqrtm(first.dot(second)).real)
    return float(shift.dot(shift) + np.trace(first) + np.trace(second) - 2 * trace)


def _numpy_moments(first_ND: Tensor, second_ND: Tensor) -> tuple[np.ndarray, ...]:
    first, second = first_ND.numpy(), second_ND.numpy()
    shift = first.mean(axis=0) - second.mean(axis=0)
    return shift, np.cov(first, rowvar=False), np.cov(second, rowvar=False)


def exact(first_ND: Tensor, second_ND: Tensor) -> float:
    """By triangular factors of the centred features, whose products are the covariances."""
    sets_ND = first_ND.double(), second_ND.double()
    roots_DD = [
        torch.linalg.qr(set_ND - set_ND.mean(dim=0), mode="r").R / (len(set_ND) - 1) ** 0.5
        for set_ND in sets_ND
    ]
    shift_D = sets_ND[0].mean(dim=0) - sets_ND[1].mean(dim=0)
    overlap = torch.linalg.svdvals(roots_DD[0] @ roots_DD[1].T).sum()
    traces = sum(root_DD.square().sum() for root_DD in roots_DD)
    return float(shift_D @ shift_D + traces - 2 * overlap)


def check(runs: Mapping[str, Distance], first_ND: Tensor, second_ND: Tensor) -> dict[str, float]:
    """Each one's share of error. Refuses to time ours or a rival that is off by more than RTOL."""
    right = exact(first_ND, second_ND)
    errors = {name: abs(run(first_ND, second_ND) / right - 1) for name, run in runs.items()}
    for name, error in errors.items():
        if not error < RTOL:
            raise SystemExit(f"fid: {name}: off by {error:.1e} of the exact {right:.6g}")
    return errors


def figures(times: Mapping[str, list[float]], errors: Mapping[str, float]) -> list[Measured]:
    rows = []
    for name, seconds in times.items():
        ratios = [theirs / own for theirs, own in zip(seconds, times["ours"], strict=True)]
        rows += [
            Measured(name, "features to distance", "CPU s", seconds),
            Measured(name, "time / ours", "x", ratios),
            Measured(name, "error / exact distance", "1", [errors[name]]),
        ]
    return rows


if __name__ == "__main__":
    main()
