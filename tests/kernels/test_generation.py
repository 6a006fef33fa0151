"""Kernels of a generating step against torch; interpreted here, and on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from dalle_kernels import generation

from dalle_dist.generate import noise

SEEDS = (
    torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12_345]),
    torch.tensor([5, 0, 1023, 7, 9, 3]),
)


def noise_of_torch(seed_M, position_M, codes):
    return noise.gumbel(seed_M.cpu(), position_M.cpu(), codes)


def norm_error(add_norm, width, dtype, device, added=True):
    """The largest error of the norm against fp64, in units of torch's own; the sum is exact."""
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, width, generator=random) * 3 + 1).to(device)
    branch = torch.randn(3, 5, width, generator=random).to(device, dtype) if added else None
    weight, bias = (torch.randn(width, generator=random).to(device, dtype) for _ in range(2))
    total, ours = add_norm(x, branch, weight, bias, 1e-5)
    assert total.equal(x + branch if added else x)
    exact = F.layer_norm(total.double(), (width,), weight.double(), bias.double(), 1e-5)
    plain = F.layer_norm(total, (width,), weight.float(), bias.float(), 1e-5).to(dtype)
    assert ours.dtype == dtype and ours.shape == x.shape
    allowed = (plain - exact).abs().max().clamp(min=1e-6)
    return ((ours - exact).abs().max() / allowed).item()


def test_interpreted():
    from test_triton_attention import interpreted

    run = interpreted("interpreted_generation.py")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "20 passed" in run.stdout


def test_arguments_that_do_not_fit_are_named():
    x, w = torch.zeros(2, 4), torch.zeros(3)
    with pytest.raises(ValueError, match=r"^x: width 4 is not that of the weight, 3"):
        generation.add_norm(x, None, w, w, 1e-5)
    with pytest.raises(ValueError, match=r"^x: strides \(1, 2\) are not contiguous"):
        generation.add_norm(torch.zeros(3, 2).T, None, w, w, 1e-5)
    with pytest.raises(ValueError, match=r"^x: dtype torch.float16 is not fp32"):
        generation.add_norm(x.half(), None, w, w, 1e-5)
    with pytest.raises(ValueError, match=r"^branch: shape \(3, 3\) is not x's, \(2, 3\)"):
        generation.add_norm(torch.zeros(2, 3), torch.zeros(3, 3), w, w, 1e-5)
    with pytest.raises(ValueError, match=r"^position: shape \(2,\) is not the seeds', \(3,\)"):
        generation.gumbel(torch.zeros(3).long(), torch.zeros(2).long(), 5)


def test_cpus_keep_torchs_own():
    assert not generation.runs_on(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_noise_on_a_gpu_is_that_of_the_cpu():
    seeds = [x.cuda() for x in SEEDS]
    found, expected = generation.gumbel(*seeds, 8192).cpu(), noise_of_torch(*SEEDS, 8192)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 2048, 3968])
def test_layer_norm_on_a_gpu_is_as_exact_as_torchs(width, dtype):
    assert norm_error(generation.add_norm, width, dtype, "cuda") <= 2
