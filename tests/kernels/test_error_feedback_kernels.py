"""The passes of error feedback: what they do by torch, what they refuse, and Triton interpreted.

Shapes: B matrices of M rows and N columns.
"""

import math
import re

import pytest
import torch
from dalle_kernels.minifloat import add_decoded, encode_rest, pack, unpack

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 32, 32), (2, 31, 67), (1, 1, 1025), (5, 40, 26), (0, 4, 4)]
LEAST = unpack(torch.tensor([1], dtype=torch.uint16), "1-6-9").item()
ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, LEAST, -LEAST, LEAST / 2, 1e-40, 16.0, -99.0]


def numbers(shape, seed=0, between=0):
    """fp32 [B, M, N] with all that is odd, and so many elements between one matrix and the next."""
    generator = torch.Generator().manual_seed(seed)
    count, inner = shape[0], shape[1] * shape[2]
    buffer = torch.randn(count * (inner + between) + 1, generator=generator)
    buffer *= 2.0 ** torch.randint(-64, 6, buffer.shape, generator=generator)
    at = torch.randint(len(buffer), (len(buffer) // 4,), generator=generator)
    buffer[at] = torch.tensor(ODD).repeat(len(at) // len(ODD) + 1)[: len(at)]
    return buffer[1:].as_strided(shape, (inner + between, shape[2], 1), 1)


def words(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << 16, shape, generator=generator, dtype=torch.int32).to(torch.uint16)


def bits(values):
    """As words, -0.0 told from 0.0; all NaN are one."""
    return values.nan_to_num(nan=77.0, posinf=math.inf, neginf=-math.inf).view(torch.int32)


def test_gradient_and_error_are_added():
    values = torch.tensor([[[1.0, math.inf]], [[3.0, math.nan]], [[-2.0, 0.5]]])
    codes = pack(torch.tensor([[[0.25, 1.0]], [[8.0, -1.0]], [[0.0, 0.125]]]), "1-6-9")
    add_decoded(values, codes, torch.tensor([2.0, 0.0, 0.5]))
    assert values.tolist() == [[[2.25, math.inf]], [[8.0, -1.0]], [[-1.0, 0.375]]]


def test_the_rest_is_kept_and_what_was_sent_takes_its_place():
    sent = torch.tensor([[[1.0, math.inf, 0.0, -math.inf, 1.0]]])
    values = torch.tensor([[[1.75, math.inf, math.inf, 5.0, -8.0]]])
    codes = torch.empty(values.shape, dtype=torch.uint16)
    encode_rest(values, sent, codes)
    assert values.equal(sent)
    assert unpack(codes, "1-6-9").tolist() == [[[0.75, 0.0, 15.984375, 15.984375, -9.0]]]


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_apart_are_as_those_together(shape):
    factor = torch.tensor([0.5, 0.0, 1.0, 2.0, 0.0])[: shape[0]]
    values, sent, codes = numbers(shape, between=9), numbers(shape, 1).contiguous(), words(shape)
    around = torch.as_strided(values, (shape[0], 9), (values.stride(0), 1), values[:1].numel() + 1)
    together, before = values.clone(memory_format=torch.contiguous_format), around.clone()
    for given in (values, together):
        add_decoded(given, codes, factor)
    assert bits(values).equal(bits(together))
    rests = [torch.empty_like(codes) for _ in range(2)]
    for given, rest in zip((values, together), rests, strict=True):
        encode_rest(given, sent, rest)
    assert rests[0].equal(rests[1]) and bits(values).equal(bits(sent))
    assert bits(around).equal(bits(before)), "wrote between the matrices"


ZEROS, CODES = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.uint16)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: add_decoded(ZEROS.double(), CODES, torch.ones(2)), "values"),
        (lambda: add_decoded(ZEROS[0], CODES[0], torch.ones(3)), "values"),
        (lambda: add_decoded(ZEROS.mT, CODES.mT, torch.ones(2)), "values"),
        (lambda: add_decoded(ZEROS[:1].expand(2, 3, 4), CODES, torch.ones(2)), "values"),
        (lambda: add_decoded(ZEROS, CODES.int(), torch.ones(2)), "codes"),
        (lambda: add_decoded(ZEROS, CODES[:1], torch.ones(2)), "codes"),
        (lambda: add_decoded(ZEROS, CODES.mT.contiguous().mT, torch.ones(2)), "codes"),
        (lambda: add_decoded(ZEROS, CODES, torch.ones(3)), "factor"),
        (lambda: add_decoded(ZEROS, CODES, torch.ones(2).double()), "factor"),
        (lambda: add_decoded(ZEROS, CODES, torch.ones(2), "cuda"), "backend"),
        (lambda: encode_rest(ZEROS, ZEROS.mT.contiguous().mT, CODES), "sent"),
        (lambda: encode_rest(ZEROS, ZEROS.half(), CODES), "sent"),
        (lambda: encode_rest(ZEROS, ZEROS, CODES[:, :2]), "codes"),
        (lambda: encode_rest(ZEROS, ZEROS, CODES, "triton"), "backend"),
    ],
)
def test_what_does_not_fit_is_named(monkeypatch, call, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()


def test_interpreted():
    """The Triton kernels, in a process of their own: the interpreter is chosen at import."""
    from test_triton_attention import interpreted

    run = interpreted("interpreted_error_feedback.py")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 16, run.stdout[-500:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_bits():
    shape = (3, 1000, 1001)
    values, sent, codes = numbers(shape), numbers(shape, 1).contiguous(), words(shape)
    factor = torch.tensor([0.3, 0.0, 1.0])
    on_gpu = [given.cuda() for given in (values, sent, codes, factor)]
    add_decoded(values, codes, factor)
    add_decoded(on_gpu[0], on_gpu[2], on_gpu[3], "triton")
    assert bits(on_gpu[0].cpu()).equal(bits(values))
    encode_rest(values, sent, codes)
    encode_rest(*on_gpu[:3], "triton")
    assert on_gpu[2].cpu().equal(codes) and bits(on_gpu[0].cpu()).equal(bits(values))
