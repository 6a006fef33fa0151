"""Moments on disk: pinned to their setting, or of the files that others hand out."""

import dataclasses

import numpy as np
import pytest
import torch

from dalle_dist.checkpoint.formats import save_tensors
from dalle_dist.errors import CheckpointError, DataError
from dalle_dist.evaluation.moments import Gaussian
from dalle_dist.evaluation.prepare import Preparation
from dalle_dist.evaluation.reference import Setting, load_reference, save_reference

SETTING = Setting("Inception, tf1-bilinear", "ab" * 32, Preparation(64).to_json(), 1.0)
MEAN = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GAUSSIAN = Gaussian(MEAN, torch.eye(3, dtype=torch.float64), 7)


def test_what_was_saved_is_loaded_under_the_same_setting(tmp_path):
    path = str(tmp_path / "reference.safetensors")
    save_reference(path, GAUSSIAN, SETTING)
    found = load_reference(path, SETTING)
    assert found.gaussian.mean_D.equal(MEAN) and found.gaussian.count == 7
    assert found.gaussian.covariance_DD.equal(GAUSSIAN.covariance_DD)
    assert found.setting == SETTING


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"network": "Inception, pillow-bicubic"}, "network Inception, tf1-bilinear"),
        ({"fingerprint": "cd" * 32}, "fingerprint abab"),
        ({"preparation": Preparation(64, filter="box").to_json()}, "preparation .*bicubic"),
        ({"blur": 2.0}, r"blur 1\.0, this evaluation has 2\.0"),
    ],
)
def test_another_setting_is_refused(tmp_path, change, said):
    path = str(tmp_path / "reference.safetensors")
    save_reference(path, GAUSSIAN, SETTING)
    with pytest.raises(DataError, match=said) as refusal:
        load_reference(path, dataclasses.replace(SETTING, **change))
    assert "\n" not in str(refusal.value)


def test_npz_files_state_no_setting(tmp_path):
    path = tmp_path / "others.npz"
    np.savez(path, mu=MEAN.float().numpy(), sigma=np.eye(3), arr_0=np.zeros(2, np.uint8))
    found = load_reference(str(path), SETTING)
    assert found.setting is None and found.gaussian.count is None
    assert found.gaussian.mean_D.equal(MEAN) and found.gaussian.covariance_DD.dtype == torch.float64


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_reference(str(tmp_path / "none.safetensors"), SETTING)
    save_tensors(tmp_path / "weights.safetensors", {"w": MEAN})
    with pytest.raises(DataError, match="not a file of reference moments"):
        load_reference(str(tmp_path / "weights.safetensors"), SETTING)
    contents = {
        "no_sigma": {"mu": MEAN.numpy()},
        "objects": {"mu": np.array([{}], dtype=object), "sigma": np.eye(1)},
    }
    for name, arrays in contents.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(DataError, match=r"not an \.npz file"):
            load_reference(str(tmp_path / f"{name}.npz"), SETTING)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"not an \.npz file"):
        load_reference(str(tmp_path / "cut.npz"), SETTING)
    np.savez(tmp_path / "shape.npz", mu=MEAN.numpy(), sigma=np.eye(2))
    with pytest.raises(DataError, match="do not belong together"):
        load_reference(str(tmp_path / "shape.npz"), SETTING)
