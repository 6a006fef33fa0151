"""The dVAE against the released shapes, a plain re-statement, and numerical integrals."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle_dist.config import DVAEConfig, DVAETrainConfig
from dalle_dist.dvae.loss import (
    elb_terms,
    kl_to_uniform,
    logit_laplace_nll,
    map_pixels,
    unmap_pixels,
)
from dalle_dist.dvae.model import DVAE
from dalle_dist.metrics.reconstruction import reconstruct
from dalle_dist.optim.dvae_schedule import DVAESchedule, cosine

SMALL = DVAEConfig(
    image_size=16, codebook_size=12, width=8, decoder_stem=6, downsamplings=2, blocks_per_group=2
)


def test_parameter_counts_of_the_released_networks():
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    counts = [sum(p.numel() for p in part.parameters()) for part in (dvae.encoder, dvae.decoder)]
    assert counts == [53_786_240, 43_829_766]


def released_shapes():
    """Shapes of OpenAI's encoder.pkl and decoder.pkl, from the published description."""

    def block(n_in, n_out, kernels):
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        for i, k in enumerate(kernels):
            yield from ((widths[i + 1], widths[i], k, k), (widths[i + 1],))
        if n_in != n_out:
            yield from ((n_out, n_in, 1, 1), (n_out,))

    def groups(n_in, widths, kernels):
        for width in widths:
            for _ in range(2):
                yield from block(n_in, width, kernels)
                n_in = width

    yield from ((256, 3, 7, 7), (256,))
    yield from groups(256, (256, 512, 1024, 2048), (3, 3, 3, 1))
    yield from ((8192, 2048, 1, 1), (8192,))
    yield from ((128, 8192, 1, 1), (128,))
    yield from groups(128, (2048, 1024, 512, 256), (1, 3, 3, 3))
    yield from ((6, 256, 1, 1), (6,))


def test_every_tensor_has_its_released_shape_in_order():
    with torch.device("meta"):
        found = [tuple(tensor.shape) for tensor in DVAE(DVAEConfig()).state_dict().values()]
    assert found == list(released_shapes())


def plain(state, x, widths, encoder):
    """Encoder or decoder from its tensors in order, with nothing but functional calls."""
    tensors = iter(state)

    def conv(x):
        weight, bias = next(tensors), next(tensors)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    x, gain = conv(x), 1 / (len(widths) * 2) ** 2
    for g, width in enumerate(widths):
        if g and encoder:
            x = F.max_pool2d(x, 2)
        elif g:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        for _ in range(2):
            y = x
            for _ in range(4):
                y = conv(y.relu())
            x = (conv(x) if x.shape[1] != width else x) + gain * y
    return conv(x.relu())


def test_function_equals_a_plain_restatement():
    torch.manual_seed(0)
    dvae = DVAE(SMALL)
    for parameter in dvae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, z = torch.rand(2, 3, 16, 16), torch.rand(2, 12, 4, 4)
    encoded = plain(dvae.encoder.state_dict().values(), 0.8 * images + 0.1, [8, 16, 32], True)
    decoded = plain(dvae.decoder.state_dict().values(), z, [32, 16, 8], False)
    torch.testing.assert_close(dvae.encode_logits(images), encoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dvae.decode_soft(z), decoded, rtol=1e-4, atol=1e-4)
    assert dvae.codes(images).equal(encoded.argmax(1))


def test_initial_deviations():
    torch.manual_seed(0)
    weight = DVAE(DVAEConfig(width=64, image_size=64)).encoder.input.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 49), rel=0.05)


def test_decode_ignores_the_spread():
    torch.manual_seed(0)
    dvae = DVAE(SMALL)
    codes = torch.randint(0, 12, (2, 4, 4))
    before = dvae.decode(codes)
    with torch.no_grad():
        dvae.decoder.output.bias[3:] += 5
    assert dvae.decode(codes).equal(before)
    assert before.shape == (2, 3, 16, 16) and 0 <= before.min() <= before.max() <= 1


def test_decode_looks_up_what_one_hot_codes_would_give():
    torch.manual_seed(0)
    dvae = DVAE(SMALL)
    torch.nn.init.normal_(dvae.decoder.input.bias)
    codes = torch.randint(0, 12, (2, 4, 4))
    one_hot = F.one_hot(codes, 12).permute(0, 3, 1, 2).float()
    expected = unmap_pixels(dvae.decode_soft(one_hot)[:, :3].sigmoid())
    torch.testing.assert_close(dvae.decode(codes), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mu", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("log_b", [-2.0, -0.5, 0.5])
def test_likelihood_integrates_to_one(mu, log_b):
    # The density has steep flanks near 0 and 1, so the grid is even in logit(x), not in x.
    y = torch.linspace(-60, 60, 400_001, dtype=torch.double)
    x = torch.sigmoid(y).clamp(1e-15, 1 - 1e-15)
    nll = logit_laplace_nll(x, torch.tensor(mu).double(), torch.tensor(log_b).double())
    inside = y.abs() < 30
    integral = torch.trapezoid((torch.exp(-nll) * x * (1 - x))[inside], y[inside])
    assert integral.item() == pytest.approx(1, abs=1e-5)


def test_kl_equals_a_slow_loop_in_double():
    logits = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    for b in range(2):
        total = 0.0
        for cell in logits[b].flatten(1).T:
            q = [math.exp(v) / sum(math.exp(w) for w in cell.tolist()) for v in cell.tolist()]
            total += sum(p * math.log(p * 5) for p in q)
        assert kl_to_uniform(logits)[b].item() == pytest.approx(total, rel=1e-12)


def test_both_terms_are_per_colour_value():
    images, stats = torch.rand(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    logits = torch.randn(2, 5, 2, 2)
    nll, kl = elb_terms(images, logits, stats)
    slow = logit_laplace_nll(map_pixels(images), stats[:, :3], stats[:, 3:]).sum() / 2 / 48
    assert nll.item() == pytest.approx(slow.item(), rel=1e-5)
    assert kl.item() == pytest.approx(kl_to_uniform(logits).sum().item() / 2 / 48, rel=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_beta_nll_multiplies_each_gradient_by_b_to_beta_and_leaves_the_value(beta):
    images, logits = torch.rand(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)
    stats = torch.randn(2, 6, 4, 4)
    stats[:, 3:] *= 3  # b from about e^-6 to e^6
    plain, weighted = stats.clone().requires_grad_(), stats.clone().requires_grad_()
    nll, _ = elb_terms(images, logits, plain)
    nll.backward()
    same, _ = elb_terms(images, logits, weighted, beta)
    same.backward()
    assert same.item() == nll.item()
    b_to_beta = stats[:, 3:].exp() ** beta
    torch.testing.assert_close(weighted.grad, plain.grad * torch.cat([b_to_beta, b_to_beta], 1))
    with torch.no_grad():
        assert elb_terms(images, logits, stats, beta)[0].item() == nll.item()


def test_pixel_map_and_its_inverse():
    x = torch.linspace(0, 1, 11)
    assert map_pixels(x)[[0, -1]].tolist() == pytest.approx([0.1, 0.9])
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_schedules_at_their_ends_and_middle():
    assert [cosine(1.0, 0.0, u, 100) for u in (0, 50, 100, 1000)] == pytest.approx([1, 0.5, 0, 0])
    paper = DVAETrainConfig()
    first, last = (DVAESchedule(paper).at(step) for step in (1, 3_000_001))
    assert (first.lr, first.temperature, first.kl_weight) == pytest.approx((1e-4, 1, 0))
    assert (last.lr, last.temperature, last.kl_weight) == pytest.approx((1.25e-6, 1 / 16, 6.6))
    assert DVAESchedule(paper).at(2501).kl_weight == pytest.approx(3.3)
    warm = DVAETrainConfig(warmup=10)
    assert DVAESchedule(warm).at(1).lr == pytest.approx(1e-5, rel=1e-3)


def test_relaxation_tends_to_hard_samples():
    torch.manual_seed(0)
    dvae, images = DVAE(SMALL), torch.rand(2, 3, 16, 16)
    noise = -torch.rand(2, 12, 4, 4).log().neg().log()
    logits, stats = dvae(images, noise, temperature=1e-4)
    hard = F.one_hot((logits + noise).argmax(1), 12).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(stats, dvae.decode_soft(hard), rtol=1e-3, atol=1e-3)


def test_images_are_reconstructed_batch_by_batch():
    codes, pictures = reconstruct(DVAE(SMALL), torch.rand(3, 3, 16, 16), batch_size=2)
    assert codes.shape == (3, 4, 4) and pictures.shape == (3, 3, 16, 16)


def _picture(*shape):
    return torch.full(shape, 0.5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (_picture(1, 3, 16, 16).byte(), r"dtype torch\.uint8 is not floating; divide by 255"),
        (_picture(1, 3, 16, 16).double(), r"float64 is not the weights'; use images\.float\(\)"),
        (_picture(3, 16, 16), r"\(3, 16, 16\) is not \[B, 3, H, W\]; add the batch"),
        (_picture(1, 16, 16, 3), r"\(1, 16, 16, 3\) is not .*; put the channels first"),
        (_picture(1, 1, 16, 16), r"\(1, 1, 16, 16\) is not .*; three channels"),
        (_picture(1, 3, 30, 16), "height 30 and width 16 are not both multiples of 4; resize"),
        (_picture(1, 3, 16, 18), "height 16 and width 18 are not both multiples of 4"),
        (_picture(1, 3, 0, 16), "height 0 and width 16"),
        (_picture(1, 3, 16, 16).numpy(), "ndarray is not a tensor"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else str(tuple(value.shape)),
)
def test_pictures_of_another_shape_or_dtype_are_refused_by_all_that_take_them(images, message):
    dvae = DVAE(SMALL)
    for entry in (dvae.codes, dvae.encode_logits, lambda x: dvae(x, torch.zeros(1), 1.0)):
        with pytest.raises(ValueError, match="images: .*" + message):
            entry(images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 255.0], r"from 0 to 255 are not in \[0, 1\]; divide by 255"),
        ([-1.0, 1.0], r"from -1 to 1 are not in \[0, 1\]; map them"),
        ([0.5, math.nan], "from nan to nan are not in"),
        ([0.5, math.inf], "from 0.5 to inf are not in .*; map them"),
        ([0.0, 1.01], "from 0 to 1.01 are not in .*; map them"),
    ],
)
def test_codes_refuses_values_outside_the_range(values, message):
    images = _picture(1, 3, 16, 16)
    images[0, 0, 0, :2] = torch.tensor(values)
    with pytest.raises(ValueError, match="images: values " + message):
        DVAE(SMALL).codes(images)


def test_any_size_the_grid_divides_is_taken_and_rounding_is_forgiven():
    dvae = DVAE(SMALL)
    images = torch.rand(2, 3, 8, 20)
    images[0, 0, 0, :2] = torch.tensor([-1e-6, 1 + 1e-6])
    codes = dvae.codes(images)
    assert codes.shape == (2, 2, 5) and codes.dtype == torch.int64
    assert dvae.decode(codes).shape == images.shape
    assert dvae.codes(images[:0]).shape == (0, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert dvae.codes(images.bfloat16().clamp(0, 1)).shape == (2, 2, 5)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 4, 4), r"dtype torch\.float32 is not int64; use codes\.long\(\)"),
        (torch.zeros(1, 4, 4, dtype=torch.int32), r"dtype torch\.int32 is not int64"),
        (torch.zeros(1, 16).long(), r"shape \(1, 16\) is not \[B, height, width\]; unflatten"),
        (torch.full((1, 4, 4), 12), "values from 12 to 12 are not in 0 to 11"),
        (torch.full((1, 4, 4), -1), "values from -1 to -1 are not in 0 to 11"),
        ([[[0]]], "list is not a tensor"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_decode_refuses_what_is_not_codes(codes, message):
    with pytest.raises(ValueError, match="codes: " + message):
        DVAE(SMALL).decode(codes)
