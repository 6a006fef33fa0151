"""Benchmarks over a slow network: it is slow, leaves nothing, and alike trainings are compared."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from tests.test_benchmarks_run import ROOT, smoke


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


@pytest.mark.slow
def test_powersgd_network_smoke(slow_network, tmp_path):
    rows = smoke("powersgd_network", tmp_path / "rows.csv", rounds=5)
    # Busy processors delay acknowledgements, and TCP then sends twice: the least is the truth.
    sent = {
        row["case"]: float(row["low"])
        for row in rows
        if row["metric"] == "sent per step at 1000 Mbit/s"
    }
    dense = sent["dense all-reduce"]
    assert 0.48 < sent["DDP, fp16"] / dense < 0.55
    assert sent["ours, bf16"] < 0.95 * sent["ours, fp32"]
    assert sent["ours, fp32"] < 0.5 * dense


@pytest.mark.slow
def test_backward_sends_smoke(slow_network, tmp_path):
    rows = smoke("backward_sends", tmp_path / "rows.csv", rounds=2)
    steps = [row for row in rows if row["metric"].startswith("step ")]
    assert len(steps) == 8 and all(float(row["median"]) > 0 for row in steps)
