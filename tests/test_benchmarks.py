"""Every benchmark runs, checks itself first, and writes rows that say where they were measured."""

import argparse
import csv
import dataclasses
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_second_run_appends_its_rows_under_one_header(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import common

    options = argparse.Namespace(out=tmp_path / "rows.csv", smoke=True)
    for median in (2.0, 5.0):
        figure = common.Measured("case", "metric", "s", [median - 1, median, median + 3])
        common.report("name", common.benchmark_config(smoke=True), [figure], options)
    rows = rows_of(options.out)
    assert [(row["low"], row["median"], row["high"]) for row in rows] == [
        ("1", "2", "5"), ("4", "5", "8"),
    ]  # fmt: skip
    assert all(row["hardware"] and row["torch"] and row["time"] for row in rows)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from dalle_kernels.sparse_attention import api

    from benchmarks import common, train_step

    config = common.benchmark_config(smoke=True)
    model = common.benchmark_model(config)
    batch = common.random_batch(config, 1)
    train_step.check(model, *batch)
    right = api.BACKENDS["cpu"]

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    monkeypatch.setitem(api.BACKENDS, "cpu", lambda qkv, mask: Skewed.apply(right(qkv, mask)))
    with pytest.raises(SystemExit, match="gradients differ"):
        train_step.check(model, *batch)


def test_a_wrong_rival_is_left_out_and_a_wrong_ours_refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)

    import torch
    from dalle_kernels.masks import AttentionMask

    from benchmarks import attention_figures, attention_rivals

    mask = AttentionMask("column", 5, 6)
    qkv, grad = torch.randn(2, mask.tokens, 3, 1, 64), torch.randn(2, mask.tokens, 1, 64)
    ours = attention_rivals.ours(qkv, grad, mask, "cpu")
    rivals = [attention_rivals.boolean(qkv, grad, mask), attention_rivals.dense(qkv, grad, mask)]
    assert attention_figures.checked([ours, *rivals], qkv, grad) == [ours, *rivals]

    def off(contender, attend):
        return dataclasses.replace(contender, attend=attend)

    def failing(*qkv):
        raise RuntimeError("no such kernel")

    # Dense attention in place of masked, gradients of another function, and no result at all.
    wrong = [
        off(rivals[0], rivals[1].attend),
        off(rivals[0], lambda *x: (y := rivals[0].attend(*x)) + 0.01 * (y - y.detach())),
        off(rivals[1], failing),
    ]
    capsys.readouterr()
    assert attention_figures.checked([ours, *wrong], qkv, grad) == [ours]
    said = capsys.readouterr().out.splitlines()
    for line, reason in zip(said, ("output", "gradient", "no such kernel"), strict=True):
        assert reason in line
    with pytest.raises(SystemExit, match="ours is not timed: gradient"):
        skewed = off(ours, lambda x: (y := ours.attend(x)) + 0.01 * (y - y.detach()))
        attention_figures.checked([skewed, *rivals], qkv, grad)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_flex_is_given_the_mask(monkeypatch, kind):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from dalle_kernels.masks import AttentionMask

    from benchmarks import attention_rivals

    mask = AttentionMask(kind, 7, 6, kernel=5)
    order, back = attention_rivals.band_order(mask)
    state = torch.arange(mask.tokens)
    for rule in (attention_rivals.mask_mod(mask), attention_rivals.mask_table(mask, order)):
        allowed = rule(state, state, state[:, None], state[None, :])
        assert allowed[back][:, back].equal(mask.dense())


def test_rivals_that_are_not_installed_are_named_and_left_out(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from dalle_kernels.masks import AttentionMask

    from benchmarks import attention_figures, attention_packages

    mask = AttentionMask("row", 5, 4)
    case = (torch.randn(2, mask.tokens, 3, 1, 64), torch.randn(2, mask.tokens, 1, 64), mask)
    absent = ("flash_attn_interface", "flash_attn", "cudnn")
    monkeypatch.setattr(sys, "meta_path", [_Absent(absent), *sys.meta_path])
    assert list(attention_packages.installed(*case)) == []
    said = capsys.readouterr().out.splitlines()
    modules = ("flash_attn_interface", "flash_attn.cute", "cudnn")
    assert [line.rpartition(": ")[2] for line in said] == [f"{m} is not installed" for m in modules]

    # Installed, but it does not load: said by the check that all rivals pass.
    monkeypatch.setattr(
        attention_packages, "_is_installed", lambda module: module != "flash_attn.cute"
    )
    rivals = list(attention_packages.installed(*case))
    assert [contender.name for contender in rivals] == ["FA3 causal", "cuDNN score_mod"]
    capsys.readouterr()
    assert attention_figures.checked(rivals, *case[:2]) == []
    assert capsys.readouterr().out.count("ModuleNotFoundError") == len(rivals)


def test_an_installed_flash_attention_3_is_compared_as_dense_and_causal(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    import torch.nn.functional as F
    from dalle_kernels.masks import AttentionMask

    from benchmarks import attention_packages, attention_rivals

    def flash_attn_func(q, k, v, causal):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2), None

    stand_in = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
    mask = AttentionMask("row", 5, 4)
    batch = (torch.randn(2, mask.tokens, 3, 2, 64), torch.randn(2, mask.tokens, 2, 64))
    (contender,) = attention_packages.flash_3(*batch, mask)
    assert attention_rivals.fault(contender, *batch) is None


class _Absent:
    """A finder by which these packages are nowhere, installed or not."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)


def test_a_lossy_powersgd_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import torch

    from benchmarks import powersgd_math
    from dalle_dist.distributed import process_group
    from dalle_dist.gradients.powersgd import factors

    device = process_group.init().device
    powersgd_math.check_ours([(32, 256)] * 2, 8, device)
    right = factors.orthonormal_BMR
    monkeypatch.setattr(factors, "orthonormal_BMR", lambda p: right(torch.flip(p, [1])))
    with pytest.raises(SystemExit, match="our output differs"):
        powersgd_math.check_ours([(32, 256)] * 2, 8, device)


def test_gradients_that_only_fp16_loses_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import torch

    from benchmarks import precision, precision_curves

    plan = precision.plans(smoke=True)[0]
    torch.manual_seed(0)
    model = precision.make_model(plan)
    for head in (model.text_unembedding, model.image_unembedding):
        torch.nn.init.normal_(head.weight, std=0.02)
    with torch.no_grad():  # a dead unit, whose gradients are zero in fp32 too
        model.blocks[0].mlp.up.weight[0] = model.blocks[0].mlp.down.weight[0] = 0
    blocks = len(precision.resblocks(model))

    def probed(log2):
        scheme = precision.Scheme("global", precision.GlobalScale(blocks, 9))
        state = {"log2": [log2] * blocks, "since_cut": [0] * blocks, "overflows": [0] * blocks}
        scheme.scales.load_state_dict(state)
        curve = precision_curves.Curve()
        precision.Run(model, scheme, plan, curve)._probe()
        return curve

    assert max(probed(13.0).underflow[0]) == 0, "what is zero in fp32 as well does not count"
    assert max(probed(13.0).error[0]) < 0.01
    assert 0.05 < min(probed(-13.0).underflow[0]) < min(probed(-15.0).underflow[0]) < 1
    assert min(probed(-40.0).underflow[0]) == 1
    assert not probed(40.0).underflow, "overflow is not measured as underflow"


def test_one_global_scale_doubles_and_halves(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import precision

    scale = precision.GlobalScale(2, window=3)
    seen = []
    for bad in ([False, False], [False, True], *[[False, False]] * 6, [True, False]):
        scale.update(bad)
        assert scale.values[0] == scale.values[1]
        seen.append(scale.values[0] / 2**13)
    assert seen == [1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1]


def test_steps_that_do_not_train_alike_have_no_cost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import precision_cost

    bf16 = [3.0, 2.0, 1.0]
    precision_cost.check({"bf16": bf16, "fp16": [3.0, 2.0, 1.01]})
    wrong = {
        "not finite": [3.0, float("nan"), 1.0],
        "does not fall": [1.0, 1.0, 1.0],
        "losses differ": [3.0, 2.0, 1.03],
    }
    for reason, fp16 in wrong.items():
        with pytest.raises(SystemExit, match=reason):
            precision_cost.check({"bf16": bf16, "fp16": fp16})
    rows = precision_cost.figures({"bf16": [0.1, 0.2], "fp16": [0.3, 0.4]})
    assert [list(row.values) for row in rows] == [[100, 200], [300, 400], pytest.approx([3, 2])]


@pytest.mark.parametrize("name", ["precision_cost", "attention_tiles"])
def test_without_a_gpu_what_needs_one_is_not_measured(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, "--threads=1"])
    importlib.import_module(f"benchmarks.{name}").main()
    assert capsys.readouterr().out == f"{name}: not measured: no GPU\n"
