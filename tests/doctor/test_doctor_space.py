"""Memory and disks that are too small for the plan, and what a cgroup leaves of memory."""

from collections import namedtuple

import pytest
import wards

from dalle_dist.distributed import process_group
from dalle_dist.doctor import memory, space
from dalle_dist.testing import run_distributed

Usage = namedtuple("Usage", "total used free")
GB = 10**9


@pytest.fixture
def look(tmp_path):
    """Rows by their names, of the emoji preset with a run folder in `tmp_path`."""

    def examined(*overrides, verb="train"):
        config = wards.config_of(tmp_path, *overrides)
        rows = wards.rows(process_group.init(), ["space"], config, verb=verb)
        return {name: rest for name, *rest in rows}

    return examined


def test_a_laptop_has_room_for_the_demo(look):
    rows = look()
    assert {verdict for verdict, *_ in rows.values()} == {"ok"}
    assert set(rows) == {"host memory", "disk: run", "disk: TMPDIR"}
    assert all(wanted.endswith(" GB") for *_, wanted in rows.values())


def test_a_full_disk_fails_unless_the_run_lies_on_it_already(look, monkeypatch, tmp_path):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(9, 9, 1000))
    rows = look()
    assert rows["disk: run"][0] == "FAIL" and str(tmp_path / "run") in rows["disk: run"][1]
    assert rows["disk: TMPDIR"][0] == "warn"
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/weights").open("wb") as file:
        file.truncate(5 * GB)
    assert look()["disk: run"][0] == "ok"


def test_little_memory_fails(look, monkeypatch):
    monkeypatch.setattr(space, "available", lambda: GB // 2)
    assert look()["host memory"][:2] == ["FAIL", f"0.5 GB, least on {process_host()}"]


def process_host():
    return f"{wards.socket.gethostname()} (rank 0)"


def test_little_device_memory_fails(look, monkeypatch):
    monkeypatch.setattr(space, "free_on_device", lambda device: GB / 100)
    assert look()["GPU memory"][0] == "FAIL"
    monkeypatch.setattr(space, "free_on_device", lambda device: 80.0 * GB)
    assert look()["GPU memory"][0] == "ok"


def test_a_cache_that_the_disk_cannot_hold_is_told(look, monkeypatch):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(9, 9, 50 * GB))
    remote = "paths.tokens=s3://bucket/tokens"
    assert look(remote, "data.cache_gb=40")["disk: cache"][0] == "ok"
    assert look(remote, "data.cache_gb=60")["disk: cache"][0] == "warn"


def test_other_stages_are_only_reported(look, monkeypatch):
    monkeypatch.setattr(space, "available", lambda: 1)
    assert look(verb="train-dvae")["host memory"][::2] == ["ok", ""]


def test_a_config_that_no_plan_covers_is_told(look):
    offload = "train.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"
    verdict, found, _ = look(offload)["plan"]
    assert verdict == "skip" and "offloads" in found


def poor_host(rank):
    wards.own_host(rank)
    if rank == 1:
        space.available = lambda: 1000


def test_the_host_with_little_memory_is_named():
    for rows in run_distributed(wards.rows, 2, ["space"], wards.config_of(), poor_host):
        (row,) = (row for row in rows if row[0] == "host memory")
        assert row[1:3] == ("FAIL", "0.0 GB, least on n1 (rank 1)")


V2 = {"memory.max": "5000", "memory.current": "4500"}, "inactive_file 1000\n"
V1 = (
    {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4500"},
    "total_inactive_file 1000\n",
)


@pytest.mark.parametrize(
    ("groups", "place", "files", "room"),
    [
        ("0::/job", "job", V2, 1500),
        ("0::/job/step", "job", V2, 1500),
        ("0::/seen/by/the/host", ".", V2, 1500),
        ("5:cpu:/\n4:memory:/job", "memory/job", V1, 1500),
        ("0::/job", "job", ({"memory.max": "max", "memory.current": "4500"}, "x 1\n"), 8 * 1024),
        ("0::/job", "other", V2, 8 * 1024),
    ],
)
def test_a_cgroup_may_leave_less_than_the_machine_has(tmp_path, groups, place, files, room):
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8 kB\n")
    (proc / "self/cgroup").write_text(groups + "\n")
    (mount / place).mkdir(parents=True)
    values, stat = files
    for name, text in {**values, "memory.stat": stat}.items():
        (mount / place / name).write_text(text)
    assert memory.available(proc, mount) == room
