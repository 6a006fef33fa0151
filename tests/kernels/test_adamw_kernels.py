"""One update of one tensor: three backends, one arithmetic."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from dalle_kernels.adamw import Hyperparameters, adamw_, api, chunked
from dalle_kernels.minifloat import pack, unpack
from slow_optimizer import slow_adamw

BY = Hyperparameters(
    step=3, lr=2e-3, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=0.045, variance_clip=5.0
)
GROUP = {
    "lr": BY.lr, "betas": (BY.beta1, BY.beta2), "eps": BY.eps, "weight_decay": BY.weight_decay,
    "variance_clip": BY.variance_clip,
}  # fmt: skip
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["fp32", "16-bit"])


def drawn(shape, packed, grad=torch.float32):
    """Parameter, gradient and moments of many sizes; variances on both sides of the clip."""
    sizes = 2.0 ** torch.randint(-40, 6, shape)
    p, g = torch.randn(shape), torch.randn(shape) * sizes
    m, v = torch.randn(shape) * sizes, torch.rand(shape) * 8 * sizes.square().clamp(max=1)
    if packed:
        m, v = pack(m, "1-6-9"), pack(v, "0-6-10")
    return p, g.to(grad), m, v


def updated(tensors, backend, by=BY):
    p, g, m, v = (tensor.clone() for tensor in tensors)
    adamw_(p, g, m, v, by, backend)
    return p, m, v


def same_bits(ours, others):
    """-0.0 and 0.0 differ, NaN of the same bits do not."""
    integers = {4: torch.int32, 2: torch.int16}
    return all(
        a.dtype == b.dtype and a.view(integers[a.itemsize]).equal(b.view(integers[b.itemsize]))
        for a, b in zip(ours, others, strict=True)
    )


@PACKED
def test_chunked_is_the_slow_loop_bit_for_bit(packed, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_PIECE", 100)
    tensors = drawn((1030,), packed)
    expected = slow_adamw(*(t.numpy() for t in tensors), BY.step, GROUP)
    ours = updated(tensors, "chunked")
    assert same_bits(ours, [torch.from_numpy(np.asarray(x)) for x in expected])
    assert (unpack(ours[2], "0-6-10") if packed else ours[2]).max() == 5.0, "nothing was clipped"


def test_fused_is_chunked_within_rounding():
    by = Hyperparameters(step=3, lr=2e-3, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=0.045)
    tensors = drawn((1000,), packed=False)
    for a, b in zip(updated(tensors, "fused", by), updated(tensors, "chunked", by), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)


@PACKED
@pytest.mark.parametrize("grad", [torch.float16, torch.bfloat16])
def test_narrow_gradients_count_as_their_fp32(packed, grad):
    p, g, m, v = drawn((500,), packed, grad)
    assert same_bits(updated((p, g, m, v), "auto"), updated((p, g.float(), m, v), "chunked"))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 50)])
def test_any_shape_and_a_transposed_gradient(shape):
    p, g, m, v = drawn(shape, packed=True)
    strided = g.T.contiguous().T if g.ndim == 2 else g
    flat = updated([t.flatten() for t in (p, g, m, v)], "auto")
    assert same_bits([t.flatten() for t in updated((p, strided, m, v), "auto")], flat)


def test_a_nan_gradient_is_not_hidden_by_the_clip():
    p, g, m, v = drawn((4,), packed=False)
    g[1] = float("nan")
    for tensor in updated((p, g, m, v), "chunked"):
        assert tensor.isnan().tolist() == [False, True, False, False]


def test_temporaries_are_a_piece_at_a_time(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        chunked, "unpack", lambda bits, fmt: sizes.append(bits.numel()) or unpack(bits, fmt)
    )
    updated(drawn((200_000,), packed=True), "auto")
    assert max(sizes) == chunked.CPU_PIECE and sum(sizes) == 2 * 200_000


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"param": torch.zeros(4, dtype=torch.bfloat16)}, "param"),
        ({"param": torch.zeros(4, 2)[:, 0]}, "param"),
        ({"grad": torch.zeros(4, dtype=torch.float64)}, "grad"),
        ({"grad": torch.zeros(5)}, "grad"),
        ({"grad": torch.zeros(4, device="meta")}, "grad"),
        ({"mean": torch.zeros(4, dtype=torch.int16)}, "mean"),
        ({"mean": torch.zeros(4, 2)[:, 0]}, "mean"),
        ({"variance": torch.zeros(4, dtype=torch.uint16)}, "variance"),
        ({"param": [0.0]}, "param"),
        ({"grad": None}, "grad"),
        ({"by": None}, "by"),
        ({"backend": "foreach"}, "backend"),
        ({"backend": "triton"}, "backend"),
        ({"backend": "fused"}, "backend"),
    ],
)
def test_what_does_not_fit_is_named(monkeypatch, change, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = {key: torch.zeros(4) for key in ("param", "grad", "mean", "variance")}
    with pytest.raises(ValueError, match=f"^{name}: "):
        adamw_(**tensors | {"by": BY} | change)


def test_a_gpu_without_triton_is_told_so_once(monkeypatch):
    monkeypatch.setattr(api, "triton_missing", lambda device: "no reason")
    api._warn.cache_clear()
    p = g = m = torch.zeros(4, device="meta")
    with pytest.warns(RuntimeWarning, match=r"adamw_ falls back .*\(chunked\): no reason"):
        assert api._quickest(p, g, m, BY) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert api._quickest(p, g, m, BY) == "chunked"
    monkeypatch.setattr(api, "triton_missing", lambda device: None)
    assert api._quickest(p, g, m, BY) == "triton"


def test_interpreted():
    from test_triton_attention import interpreted

    run = interpreted("interpreted_adamw.py")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 10, run.stdout[-500:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@PACKED
@pytest.mark.parametrize("grad", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_bits_of_a_cpu(packed, grad):
    tensors = drawn((1_000_003,), packed, grad)
    expected = updated(tensors, "chunked")
    on_gpu = [tensor.cuda() for tensor in tensors]
    for backend in ("triton", "chunked"):
        ours = [tensor.cpu() for tensor in updated(on_gpu, backend)]
        assert same_bits(ours, expected), backend


def test_the_compiled_kernel_rounds_every_operation():
    """What equal bits on GPUs rest on: nothing fused, nothing approximate, denormals kept."""
    triton = pytest.importorskip("triton", reason="triton is not installed: make .venv/triton")
    from dalle_kernels.adamw.triton_adamw import OPTIONS, SCALARS, adamw_update

    tensors = {"param": "*fp32", "grad": "*bf16", "mean": "*u16", "variance": "*u16"}
    types = tensors | {"numel": "i32"} | dict.fromkeys(SCALARS, "fp32")
    names = adamw_update.arg_names
    constants = {"CLIP": True, "PACKED": True, "BLOCK": 1024}
    source = triton.compiler.ASTSource(
        adamw_update,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target, OPTIONS).asm["ptx"]
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "mul" in ptx
    assert not re.findall(r"\bfma\.|\.ftz|\.approx", ptx)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step: 0 is below 1"),
        ({"beta1": 1.0}, r"beta1: 1\.0 is not in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2: -0\.1 is not in"),
    ],
)
def test_settings_that_would_divide_by_zero_are_refused(change, message):
    with pytest.raises(ValueError, match="^" + message):
        dataclasses.replace(BY, **change)
