"""Moments of a reference set on disk, with the setting that they were measured in.

A distance to moments of another network, resize or blur is a number that means nothing, so a file
of ours is refused under another setting. The `.npz` files with `mu` and `sigma` that others hand
out state no setting: `Reference.setting` is then None, and whoever prints the figure says so.

Shape suffix: D features.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from dalle_dist import storage
from dalle_dist.checkpoint.formats import load_tensors, read_notes, save_tensors
from dalle_dist.errors import DataError
from dalle_dist.evaluation.features import FeatureNetwork
from dalle_dist.evaluation.moments import Gaussian
from dalle_dist.evaluation.prepare import Preparation

NOTE = "evaluation"  # under which a file's header has its setting and count


@dataclass(frozen=True)
class Setting:
    """What features depend on beside the images.

    network      name, which includes how it resizes
    fingerprint  of its weights
    preparation  in its JSON form
    blur         radius, pixels
    """

    network: str
    fingerprint: str
    preparation: str
    blur: float

    @classmethod
    def of(cls, network: FeatureNetwork, preparation: Preparation, blur: float = 0.0) -> Setting:
        return cls(network.name, network.fingerprint, preparation.to_json(), float(blur))


@dataclass(frozen=True)
class Reference:
    """Moments and their setting, None where the file states none.

    halves   `halves_check` of the images that the moments are of, where it was measured
    """

    gaussian: Gaussian
    setting: Setting | None
    halves: float | None = None


def save_reference(
    path: str, gaussian: Gaussian, setting: Setting, halves: float | None = None
) -> None:
    """Write a safetensors file, local or on S3, whole or not at all. Raises DataError.

    Args:
        halves: `halves_check` of the images, which moments alone cannot give again.
    """
    note = json.dumps({**asdict(setting), "count": gaussian.count, "halves": halves})
    tensors = {"mean": gaussian.mean_D, "covariance": gaussian.covariance_DD}
    save_tensors(path, tensors, {NOTE: note})


def load_reference(path: str, setting: Setting) -> Reference:
    """What `save_reference` wrote in the same setting, or an `.npz` file with `mu` and `sigma`.

    Raises:
        DataError: made in another setting, damaged, or it holds something else.
        CheckpointError: a safetensors file that is absent or damaged.
    """
    if path.endswith(".npz"):
        return Reference(_load_npz(path), None)
    tensors = load_tensors(path)
    note = read_notes(path).get(NOTE)
    if note is None or tensors.keys() != {"mean", "covariance"}:
        raise DataError(f"{path}: not a file of reference moments")
    found = json.loads(note)
    count, halves = found.pop("count"), found.pop("halves")
    _refuse_other(path, Setting(**found), setting)
    gaussian = _gaussian(path, tensors["mean"], tensors["covariance"], count)
    return Reference(gaussian, setting, halves)


def _refuse_other(path: str, found: Setting, wanted: Setting) -> None:
    for name, value in asdict(found).items():
        here = getattr(wanted, name)
        if value != here:
            raise DataError(
                f"{path}: measured with {name} {value}, this evaluation has {here}; "
                "measure the reference set anew"
            )


def _load_npz(path: str) -> Gaussian:
    try:
        with np.load(io.BytesIO(storage.read_bytes(path))) as file:
            mean, covariance = (file[name].astype(np.float64) for name in ("mu", "sigma"))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not an .npz file with `mu` and `sigma` ({error})") from None
    return _gaussian(path, torch.from_numpy(mean), torch.from_numpy(covariance), None)


def _gaussian(path: str, mean_D: Tensor, covariance_DD: Tensor, count: int | None) -> Gaussian:
    dim = mean_D.numel()
    if mean_D.shape != (dim,) or covariance_DD.shape != (dim, dim):
        shapes = f"{tuple(mean_D.shape)} and {tuple(covariance_DD.shape)}"
        raise DataError(f"{path}: mean and covariance of shapes {shapes} do not belong together")
    return Gaussian(mean_D, covariance_DD, count)
