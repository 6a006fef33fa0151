"""Every benchmark runs, checks itself first, and writes rows that say where they were measured."""

import argparse
import csv
import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MAY_BE_ZERO = {
    "steps skipped",
    "by Householder, 20 steps",
    "gradient underflow, worst resblock",
    "gradient underflow, all resblocks",
    "error / exact distance",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("train_step", {"training step", "speed", "GEMM peak", "share of GEMM peak"}),
        (
            "attention",
            {"forward", "forward + backward speed", "forward share of floor", "peak memory"},
        ),
        ("sampling", {"sampling", "one image", "step", "step time", "time"}),
        ("generate", {"one caption", "time", "peak memory beyond the model's"}),
        ("checkpoint", {"pause", "whole save", "load", "size"}),
        ("powersgd_math", {"layer shards", "ours, layer", "share of a step's FLOP"}),
        ("precision_cost", {"training step", "step time"}),
        ("dvae_step", {"training step", "speed"}),
        ("fid", {"features to distance", "time / ours", "error / exact distance"}),
        (
            "data",
            {"tokens", "tokens from S3", "images", "8 loader processes", "build, 64x64"},
        ),
        (
            "checkpoint_convert",
            {"to safetensors", "memory / fp32 weights", "its time / ours", "its memory / ours"},
        ),
        ("busy_machine", {"quiet", "beside one busy process"}),
        ("precision", {"held-out loss", "held-out loss / fp32's", "steps skipped"}),
    ],
)
def test_smoke_writes_rows(tmp_path, name, metrics):
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--rounds=1", "--threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = rows_of(out)
    assert metrics <= {row["metric"] for row in rows}
    for row in rows:
        assert float(row["median"]) > 0 or row["metric"] in MAY_BE_ZERO
        assert row["hardware"] and row["torch"] and row["threads"] == "1"


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
    import dataclasses

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
    from dalle_dist.gradients.powersgd import factored

    device = process_group.init().device
    powersgd_math.check_ours([(32, 256)] * 2, 8, device)
    right = factored.orthonormal_BMR
    monkeypatch.setattr(factored, "orthonormal_BMR", lambda p: right(torch.flip(p, [1])))
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


@pytest.fixture
def slow_network(monkeypatch):
    """The module, where namespaces can be made; in CI they must."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import slow_network

    if os.geteuid() == 0 and shutil.which("apt-get") and not shutil.which("ip"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "iproute2"]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True)
    reason = slow_network.missing()
    if reason and os.environ.get("CI"):
        pytest.fail(f"in CI the slow network must be tested: {reason}")
    if reason:
        pytest.skip(reason)
    return slow_network


def namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


SENDER = """
import os, socket, sys, time
from pathlib import Path
if os.environ["RANK"] == "1":
    sys.exit()
counter, packets = Path("/sys/class/net/slow0/statistics/tx_bytes"), 2_000
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
before, start = int(counter.read_text()), time.perf_counter()
for _ in range(packets):
    udp.sendto(b"x" * 1000, ("10.77.0.2", 9))
while int(counter.read_text()) - before < 1_042 * packets:
    time.sleep(0.001)
Path(sys.argv[1]).write_text(f"{int(counter.read_text()) - before} {time.perf_counter() - start}")
"""


def test_a_slow_network_is_slow_and_counts(slow_network, tmp_path):
    with slow_network.SlowNetwork(20) as network:
        network.run([sys.executable, "-c", SENDER, str(tmp_path / "out")], 1, 30)
        assert all(node in namespaces() for node in network.nodes)
    count, seconds = map(float, (tmp_path / "out").read_text().split())
    # Each of the 2,000 packets has 42 bytes of headers; up to 256 kB go out at once.
    assert 2_084_000 <= count <= 2_090_000
    assert (2_084_000 - 256_000) * 8 / 20e6 * 0.98 < seconds < 3
    assert not any(node in namespaces() for node in network.nodes)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(3)",
         "rank 1 ended with 3"),
        ("import subprocess, time; subprocess.Popen(['sleep', '67.125']); time.sleep(60)",
         "not done in 2 s"),
    ],
)  # fmt: skip
def test_a_failed_run_leaves_nothing(slow_network, program, message):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message), slow_network.SlowNetwork(100) as network:
        network.run([sys.executable, "-c", program], 1, 2)
    assert time.monotonic() - start < 10
    assert not any(node in namespaces() for node in network.nodes)
    listed = subprocess.run(["pgrep", "-f", "^sleep 67.125"], capture_output=True, text=True).stdout
    assert not listed, "what a rank has started outlives it"


@pytest.mark.slow
def test_a_terminated_benchmark_leaves_nothing(slow_network):
    command = [sys.executable, "-m", "benchmarks.powersgd_network", "--smoke", "--threads=1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    stem, deadline = f"slow{process.pid}n", time.monotonic() + 60
    # Number 0 only proves that there can be one; the first contender trains in number 1.
    while f"{stem}1b" not in namespaces() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    assert "terminated" in process.communicate(timeout=20)[1]
    assert stem not in namespaces()


def test_without_root_the_network_says_why(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import powersgd_network

    monkeypatch.setattr(sys, "argv", ["powersgd_network", "--smoke"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    powersgd_network.main()
    assert capsys.readouterr().out == (
        "powersgd_network: not measured: network namespaces need root on Linux\n"
    )


def test_contenders_that_train_another_model_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import powersgd_network
    from benchmarks.powersgd_rank import Outcome

    good = Outcome([1.0] * 5, [0.5] * 5, [9] * 5, [3.0, 2.5, 2.0, 1.5, 1.0], 0.9, "a")
    names = [contender.name for contender in powersgd_network.CONTENDERS]
    curves = {(name, seed): [good, good] for name in names for seed in powersgd_network.SEEDS}
    slow = powersgd_network.RATES[1]

    def timed(**changes):
        found = {(rate, name): [good, good] for rate in powersgd_network.RATES for name in names}
        ranks = [dataclasses.replace(good, **changes), good]
        found[slow, "ours, bf16"] = ranks if "weights" in changes else ranks[:1] * 2
        return found

    powersgd_network.check(curves, timed())
    wrong = {
        "weights": ({"weights": "b"}, "weights or losses differ"),
        "finite": ({"losses": [3.0, float("nan"), 2.0, 1.5, 1.0]}, "not finite"),
        "first": ({"losses": [3.1, 2.5, 2.0, 1.5, 1.0]}, "first loss"),
        "rate": ({"losses": [3.0, 2.5, 2.2, 1.5, 1.0]}, "depend on the rate"),
    }
    for changes, reason in wrong.values():
        with pytest.raises(SystemExit, match=f"ours, bf16 at {slow}.*{reason}"):
            powersgd_network.check(curves, timed(**changes))
    apart = {**curves, ("DDP, fp16", 2): [good, dataclasses.replace(good, weights="b")]}
    with pytest.raises(SystemExit, match="DDP, fp16, seed 2: the ranks' weights"):
        powersgd_network.check(apart, timed())


def outcome(seconds, sent, losses):
    from benchmarks.powersgd_rank import Outcome

    return Outcome(seconds, seconds, sent, losses, losses[-1], "a")


def test_outer_steps_are_spread_over_all_and_slower_contenders_make_fewer_steps(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import powersgd_figures

    ten = powersgd_figures.diloco(10, "bf16")
    dense = powersgd_figures.DENSE
    monkeypatch.setattr(powersgd_figures, "CONTENDERS", (dense, ten))
    inner, outer = 1.0, 6.0
    often = [9.0] * 3 + [inner, inner, outer] * 2
    assert powersgd_figures.per_step(ten, often) == [1.5, 1.5]
    falling = [float(number) for number in range(30, 0, -1)]
    curves = {
        (dense.name, 0): [outcome([], [], falling)] * 2,
        (ten.name, 0): [outcome([], [], falling)] * 2,
    }
    timed = {
        (100, dense.name): [outcome([3.0] * 9, [10**6] * 9, falling)] * 2,
        (100, ten.name): [outcome(often, [0, 0, 10**6] * 3, falling)] * 2,
    }
    found = {(r.case, r.metric): r.median for r in powersgd_figures.figures(curves, timed)}
    assert found[ten.name, "speed at 100 Mbit/s"] == 2
    assert found[dense.name, "sent per step at 100 Mbit/s"] == 2
    assert found[ten.name, "bytes at 100 Mbit/s"] == pytest.approx(10)
    assert found[dense.name, "steps in equal time at 100 Mbit/s"] == 15
    assert found[dense.name, "loss in equal time at 100 Mbit/s"] == 20.5  # steps 6 to 15
    assert found[ten.name, "loss in equal time at 100 Mbit/s"] == 5.5


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


@pytest.mark.slow
def test_powersgd_network_smoke(slow_network, tmp_path):
    out = tmp_path / "rows.csv"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.powersgd_network", "--smoke", "--rounds=5",
         "--threads=1", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    # Busy processors delay acknowledgements, and TCP then sends twice: the least is the truth.
    sent = {
        row["case"]: float(row["low"])
        for row in rows_of(out)
        if row["metric"] == "sent per step at 1000 Mbit/s"
    }
    dense = sent["dense all-reduce"]
    assert 0.48 < sent["DDP, fp16"] / dense < 0.55
    assert sent["ours, bf16"] < 0.95 * sent["ours, fp32"]
    assert sent["ours, fp32"] < 0.5 * dense
