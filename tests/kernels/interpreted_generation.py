"""Layer norm and noise of a generating step under the interpreter; run by test_generation.py."""

import pytest
import torch
from dalle_kernels.generation.triton_generation import launch_add_norm, launch_gumbel
from test_generation import SEEDS, noise_of_torch, norm_error


@pytest.mark.parametrize("codes", [1, 1000, 1024, 2050])
def test_noise_is_that_of_torch(codes):
    found, expected = launch_gumbel(*SEEDS, codes), noise_of_torch(*SEEDS, codes)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 64, 96, 2048])
@pytest.mark.parametrize("added", [True, False])
def test_layer_norm_is_as_exact_as_torchs(width, dtype, added):
    assert norm_error(launch_add_norm, width, dtype, "cpu", added) <= 2
