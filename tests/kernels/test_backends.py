"""Which backend runs, and what is said when the wanted one cannot."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from dalle_kernels import devices
from dalle_kernels.masks import AttentionMask
from dalle_kernels.sparse_attention import api, sparse_attention

MASK = AttentionMask("row", 4, 4)
QKV = torch.zeros(1, MASK.tokens, 3, 1, 32)
GPU = torch.device("cuda", 0)


def on_a_gpu(monkeypatch, capability=(9, 0), installed=True):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: installed or None)


def gpu_qkv(dtype=torch.bfloat16, width=64):
    """What choosing a backend asks of qkv."""
    return SimpleNamespace(device=GPU, dtype=dtype, shape=(1, MASK.tokens, 3, 1, width))


@pytest.mark.parametrize(
    ("machine", "qkv", "reason"),
    [
        ({"installed": False}, {}, "triton is not installed"),
        ({"capability": (7, 5)}, {}, "compute capability 7.5, below 8.0"),
        ({}, {"dtype": torch.float64}, "dtype torch.float64"),
        ({}, {"width": 48}, "head width 48"),
    ],
)
def test_one_warning_says_to_what_and_why(monkeypatch, machine, qkv, reason):
    on_a_gpu(monkeypatch, **machine)
    api.warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"falls back to dense.*\(reference\): .*{reason}"):
        assert api.quickest(gpu_qkv(**qkv), MASK) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert api.quickest(gpu_qkv(**qkv), MASK) == "reference"


def test_triton_where_it_runs(monkeypatch):
    on_a_gpu(monkeypatch)
    assert api.quickest(gpu_qkv(), MASK) == "triton"


def test_triton_asked_for_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot run here: "):
        sparse_attention(QKV, MASK, "triton")


def test_on_cpus_images_of_some_size_take_the_structured_path():
    large = AttentionMask("row", 4, 12)
    assert api.quickest(QKV, large) == "cpu"
    assert api.quickest(QKV, MASK) == "reference"


@pytest.mark.parametrize(
    ("qkv", "name"),
    [
        (torch.zeros(1, MASK.tokens, 3, 1, 32, dtype=torch.int32), "qkv"),
        (torch.zeros(1, MASK.tokens, 3, 1, 32).to(torch.float8_e4m3fn), "qkv"),
        (torch.zeros(1, MASK.tokens, 3, 0, 32), "qkv"),
        (QKV.tolist(), "qkv"),
        (QKV.to("meta"), "backend"),
    ],
)
def test_what_no_backend_takes(qkv, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        sparse_attention(qkv, MASK, "cpu")


def test_a_dense_mask_is_named():
    with pytest.raises(ValueError, match=r"^mask: Tensor is not an AttentionMask"):
        sparse_attention(QKV, MASK.dense())
