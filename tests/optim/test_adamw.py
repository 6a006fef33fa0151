"""AdamW against slow loops and torch's; state through files, narrowed groups, skipped steps."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from dalle_kernels.minifloat import unpack
from slow_optimizer import slow_adamw
from torch import nn

from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.optim.adamw import AdamW

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045}
KINDS = pytest.mark.parametrize(
    ("moments", "clip"), [("fp32", 0.0), ("fp32", 5.0), ("16-bit", 0.0), ("16-bit", 5.0)]
)


def parameters(*sizes):
    return [nn.Parameter(torch.randn(size)) for size in sizes]


def gradients(params, step, dtype=torch.float32):
    """Different at each step, the same at each call; some of them beyond the clip of 5."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        size = 10.0 ** torch.randint(-12, 2, param.shape, generator=generator)
        param.grad = None
        grad = (torch.randn(param.shape, generator=generator) * size).to(dtype)
        # A gradient of another dtype than its parameter, as DeepSpeed hands over.
        param.grad_dtype = None
        param.grad = grad


def bits(optimizer):
    """All parameters and state, as comparable numbers."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            for tensor in (param, *(state[name] for name in sorted(state))):
                view = {4: torch.int32, 2: torch.int16}[tensor.itemsize]
                found.append(tensor.detach().flatten().view(view).tolist())
    return found


def run(optimizer, steps):
    for step in steps:
        for group in optimizer.param_groups:
            gradients(group["params"], step)
        optimizer.step()


def saved(optimizer):
    """Through a file, read without unpickling code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_fp32_moments_against_a_loop_in_doubles():
    (param,) = parameters(200)
    exact, mean, variance = param.detach().double().numpy().copy(), np.zeros(200), np.zeros(200)
    optimizer = AdamW([param], **OPTIONS)
    for step in range(1, 30):
        gradients([param], step)
        g = param.grad.double().numpy()
        optimizer.step()
        for i in range(200):
            mean[i] = 0.9 * mean[i] + (1 - 0.9) * g[i]
            variance[i] = 0.96 * variance[i] + (1 - 0.96) * g[i] ** 2
            corrected = mean[i] / (1 - 0.9**step), variance[i] / (1 - 0.96**step)
            exact[i] *= 1 - 3e-3 * 0.045
            exact[i] -= 3e-3 * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
    np.testing.assert_allclose(param.detach().numpy(), exact, rtol=0, atol=2e-6)


def test_fp32_moments_are_torchs_own_bit_for_bit():
    ours = parameters(100, (7, 9))
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    for optimizer in optimizers:
        run(optimizer, range(1, 20))
    assert bits(optimizers[0]) == bits(optimizers[1])


@KINDS
def test_every_step_is_the_slow_loop(moments, clip):
    (param,) = parameters(150)
    p = param.detach().numpy().copy()
    m = np.zeros(150, np.uint16 if moments == "16-bit" else np.float32)
    v, options = m.copy(), OPTIONS | {"variance_clip": clip}
    optimizer = AdamW([param], moments=moments, **options)
    for step in range(1, 12):
        gradients([param], step)
        p, m, v = slow_adamw(p, param.grad.numpy(), m, v, step, options)
        optimizer.step()
    state = optimizer.state[param]
    if (moments, clip) == ("fp32", 0.0):  # torch's kernel rounds less often
        np.testing.assert_allclose(param.detach().numpy(), p, rtol=1e-5, atol=1e-7)
    else:
        assert param.detach().numpy().tobytes() == p.tobytes()
        assert state["exp_avg"].numpy().tobytes() == m.tobytes()
        assert state["exp_avg_sq"].numpy().tobytes() == v.tobytes()
    assert state["step"].equal(torch.tensor(11.0)) and state["exp_avg"].shape == param.shape


@pytest.mark.parametrize("moments", ["fp32", "16-bit"])
def test_the_variance_is_clipped_before_it_is_used(moments):
    """A gradient of 100: v would be 400, bias-corrected 10,000, and the first step lr."""
    (param,) = parameters(1)
    with torch.no_grad():
        param.fill_(0.0)
    optimizer = AdamW([param], lr=1.0, betas=(0.0, 0.96), moments=moments, variance_clip=5.0)
    param.grad = torch.tensor([100.0])
    optimizer.step()
    assert param.item() == pytest.approx(-100 / math.sqrt(5 / (1 - 0.96)), rel=1e-6)


@pytest.mark.parametrize("beta2", [0.96, pytest.param(0.999, marks=pytest.mark.slow)])
def test_how_near_a_packed_variance_comes_to_its_goal(beta2):
    """What the docstring says of beta2: goals all over a binade, from far below and far above."""
    goal = torch.linspace(1, 4, 200).repeat(2)
    param = nn.Parameter(torch.zeros(400))
    optimizer = AdamW([param], lr=0.0, betas=(0.9, beta2), moments="16-bit")
    param.grad = torch.cat([torch.zeros(200), torch.full((200,), 3.9)])
    for step in range(int(10 / (1 - beta2))):
        if step == 10:
            param.grad = goal.sqrt()
        optimizer.step()
    variance = unpack(optimizer.state[param]["exp_avg_sq"], "0-6-10")
    missed = ((goal - variance).abs() / variance).max().item()
    assert 0.7 < missed / (2**-11 / (1 - beta2)) < 1.01


def test_the_moments_of_16_bits_take_half_the_bytes():
    sizes = {}
    for moments in ("fp32", "16-bit"):
        params = parameters(10_000, (30, 40))
        optimizer = AdamW(params, moments=moments)
        run(optimizer, [1])
        sizes[moments] = sum(
            state[name].untyped_storage().nbytes()
            for state in optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        )
    assert sizes == {"fp32": 11_200 * 8, "16-bit": 11_200 * 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@KINDS
def test_narrow_gradients_count_as_their_fp32(moments, clip, dtype):
    runs = []
    for widen in (False, True):
        torch.manual_seed(1)
        (param,) = parameters(300)
        optimizer = AdamW([param], moments=moments, variance_clip=clip or 5.0, **OPTIONS)
        for step in range(1, 4):
            gradients([param], step, dtype)
            if widen:
                param.grad = param.grad.float()
            optimizer.step()
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@KINDS
def test_a_skipped_step_leaves_every_bit(moments, clip):
    optimizer = AdamW(parameters(50, (4, 5)), moments=moments, variance_clip=clip, **OPTIONS)
    run(optimizer, [1, 2])
    before = bits(optimizer)
    optimizer.skip = True
    run(optimizer, [3])
    assert bits(optimizer) == before
    optimizer.skip = False
    run(optimizer, [3])
    assert bits(optimizer) != before


def test_a_skipped_first_step_makes_no_state():
    optimizer = AdamW(parameters(5))
    optimizer.skip = True
    run(optimizer, [1])
    assert not optimizer.state


@pytest.mark.parametrize("moments", ["fp32", "16-bit"])
def test_one_group_at_a_time(moments):
    """ZeRO-1 and 2 narrow the list of groups for each call."""
    runs = []
    for narrowed in (False, True):
        torch.manual_seed(1)
        groups = [
            {"params": parameters(40), "weight_decay": 0.1, "moments": moments},
            {"params": parameters(30), "lr": 1e-2, "moments": "fp32"},
        ]
        optimizer = AdamW(groups, **OPTIONS | {"weight_decay": 0.0})
        for step in range(1, 5):
            whole = optimizer.param_groups
            for group in whole:
                gradients(group["params"], step)
            for part in [[group] for group in whole] if narrowed else [whole]:
                optimizer.param_groups = part
                optimizer.step()
            optimizer.param_groups = whole
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("moments", ["fp32", "16-bit"])
def test_one_shard_at_a_time(moments):
    """ZeRO-3 puts flat shards into a group in turn, and empties it after each call.

    Lengths that a vector of 16 divides: torch's fused kernel rounds what is left over differently.
    """
    shards, whole = [torch.zeros(64), torch.zeros(48)], nn.Parameter(torch.zeros(112))
    optimizers = [AdamW([p], moments=moments, **OPTIONS) for p in (nn.Parameter(whole), whole)]
    for step in range(1, 5):
        gradients([whole], step)
        for shard, grad in zip(shards, whole.grad.split([64, 48]), strict=True):
            shard.grad = grad
            optimizers[0].param_groups[0]["params"] = [shard]
            optimizers[0].step()
            optimizers[0].param_groups[0]["params"] = []
        optimizers[1].step()
    assert torch.cat(shards).equal(whole.detach())
    for name in ("exp_avg", "exp_avg_sq"):
        parts = [optimizers[0].state[shard][name] for shard in shards]
        assert torch.cat(parts).equal(optimizers[1].state[whole][name])


def test_counters_that_are_set_to_zero_in_place_start_anew():
    (param,) = parameters(20)
    optimizer = AdamW([param], lr=0.0, **{k: v for k, v in OPTIONS.items() if k != "lr"})
    before = param.detach().clone()
    param.grad = torch.zeros(20)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    assert param.equal(before)
    fresh = AdamW([nn.Parameter(before)], **OPTIONS)
    optimizer.param_groups[0]["lr"] = OPTIONS["lr"]
    run(optimizer, [1, 2])
    run(fresh, [1, 2])
    assert bits(optimizer) == bits(fresh)


@KINDS
def test_a_run_that_was_saved_and_loaded_goes_on_bit_for_bit(moments, clip):
    def optimizer(params):
        return AdamW(params, moments=moments, variance_clip=clip, **OPTIONS)

    straight = optimizer(parameters(70, (3, 4)))
    run(straight, [1, 2, 3])
    halfway = saved(straight)
    copies = [nn.Parameter(p.detach().clone()) for p in straight.param_groups[0]["params"]]
    resumed = optimizer(copies)
    run(straight, [4, 5])
    resumed.load_state_dict(halfway)
    assert resumed.state[copies[0]]["exp_avg"].dtype == (
        torch.uint16 if moments == "16-bit" else torch.float32
    )
    run(resumed, [4, 5])
    assert bits(resumed) == bits(straight)


@KINDS
def test_a_channels_last_parameter_is_updated_as_a_contiguous_one(moments, clip):
    """Halfway the moments come from the contiguous one's file."""
    contiguous = parameters((6, 5, 3, 4))
    strided = [nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in contiguous]
    assert not strided[0].is_contiguous()
    first, second = (
        AdamW(params, moments=moments, variance_clip=clip, **OPTIONS)
        for params in (contiguous, strided)
    )
    run(first, [1, 2])
    run(second, [1, 2])
    assert bits(second) == bits(first)
    second.load_state_dict(saved(first))
    run(first, [3, 4])
    run(second, [3, 4])
    assert bits(second) == bits(first)
    assert not strided[0].is_contiguous()


def test_what_was_loaded_is_a_copy():
    optimizer = AdamW(parameters(10), moments="16-bit")
    run(optimizer, [1])
    state = optimizer.state_dict()
    other = AdamW(parameters(10), moments="16-bit")
    other.load_state_dict(state)
    before = copy.deepcopy(state)
    run(other, [2])
    for name, tensor in before["state"][0].items():
        assert tensor.equal(state["state"][0][name])


def test_options_and_moments_come_from_the_file():
    optimizer = AdamW(parameters(10), moments="16-bit", variance_clip=5.0, lr=0.5)
    run(optimizer, [1])
    other = AdamW(parameters(10))
    other.load_state_dict(saved(optimizer))
    group = other.param_groups[0]
    assert (group["moments"], group["variance_clip"], group["lr"]) == ("16-bit", 5.0, 0.5)
    run(other, [2])


def test_a_file_of_torchs_adamw_goes_on():
    ours = parameters(30)
    theirs = torch.optim.AdamW([nn.Parameter(ours[0].detach().clone())], fused=True, **OPTIONS)
    first = torch.optim.AdamW(ours, fused=True, **OPTIONS)
    run(first, [1, 2])
    run(theirs, [1, 2, 3])
    optimizer = AdamW(ours, moments="16-bit", **OPTIONS)
    optimizer.load_state_dict(saved(first))
    run(optimizer, [3])
    assert bits(optimizer) == bits(theirs)


def test_packed_moments_through_what_deepspeed_does_with_state():
    (param,) = parameters(64)
    optimizer = AdamW([param], moments="16-bit")
    run(optimizer, [1])
    packed = optimizer.state[param]["exp_avg_sq"]
    assert packed.unique().numel() > 10
    pieces = [packed.narrow(0, 0, 20).clone(), packed.narrow(0, 20, 44)]
    assert torch.cat(pieces).equal(packed)
    buffer = torch.zeros_like(packed)
    buffer.narrow(0, 0, 20).data.copy_(pieces[0].data)
    assert buffer[:20].equal(packed[:20]) and not buffer[20:].any()
    assert buffer.zero_().equal(torch.zeros(64, dtype=torch.uint16))


def test_moments_that_a_cast_destroyed_are_refused():
    (param,) = parameters(8)
    optimizer = AdamW([param], moments="16-bit")
    run(optimizer, [1])
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].float()
    before = param.detach().clone()
    with pytest.raises(CheckpointError, match=r"'exp_avg': torch\.float32, but moments are 16-bit"):
        run(optimizer, [2])
    assert param.equal(before)


def test_a_failed_update_is_not_counted():
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = AdamW([param])
    with pytest.raises(ValueError, match=r"^param: dtype torch\.bfloat16"):
        run(optimizer, [1])
    assert optimizer.state[param]["step"] == 0


def test_a_closure_is_called_with_gradients_on():
    (param,) = parameters(3)
    optimizer = AdamW([param])

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    before = param.detach().clone()
    assert optimizer.step(closure) == pytest.approx(before.square().sum().item())
    assert not param.equal(before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"moments": "8-bit"}, "moments"),
        ({"variance_clip": -1.0}, "variance_clip"),
        ({"lr": -1.0}, "lr"),
        ({"eps": math.nan}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"implementation": "cuda"}, "implementation"),
    ],
)
def test_what_does_not_fit_is_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        AdamW(parameters(3), **options)


def test_triton_asked_for_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    optimizer = AdamW(parameters(3), implementation="triton")
    with pytest.raises(ConfigError, match=r"^implementation: 'triton' cannot run"):
        run(optimizer, [1])


def test_torch_asked_for_on_a_gpu_is_not_triton():
    assert AdamW(parameters(3), implementation="torch")._backend(torch.device("cuda")) == "chunked"
    assert AdamW(parameters(3))._backend(torch.device("cuda")) == "auto"
