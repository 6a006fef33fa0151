"""Versions, packages, code and config that are not the same everywhere, or not the right ones."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import wards

from dalle_dist.distributed import process_group
from dalle_dist.doctor import sameness, versions
from dalle_dist.testing import run_distributed


@pytest.fixture
def alone():
    """Rows of one check on one rank."""
    return lambda name, *args, **options: wards.rows(process_group.init(), [name], *args, **options)


def installed(**changed):
    """What `versions.installed` finds where all is as tested, but for these packages."""
    pins = {name: versions.pins()[name] for name in versions.PACKAGES}
    return lambda: {"python": "3.11.7", "CUDA": "", **pins, **changed}


def other_torch(rank):
    wards.own_host(rank)
    version = "2.12.0" if rank == 1 else versions.pins()["torch"]
    versions.installed = installed(torch=version)


def test_a_rank_with_another_version_fails():
    tested = versions.pins()["torch"]
    for rows in run_distributed(wards.rows, 2, ["versions"], None, other_torch):
        found = f"torch: {tested} on n0 (rank 0); 2.12.0 on n1 (rank 1)"
        assert rows == [("versions", "FAIL", found, "the same on all ranks")]


@pytest.mark.parametrize(
    ("changed", "verdict", "found"),
    [
        ({}, "ok", "python 3.11.7, torch"),
        ({"torch": "2.13.0+cu130"}, "ok", "torch 2.13.0[+]cu130"),
        ({"triton": ""}, "ok", "torch"),
        ({"deepspeed": "0.18.9"}, "ok", "deepspeed 0.18.9"),
        ({"numpy": "2.0.0"}, "warn", "numpy 2.0.0$"),
        ({"webdataset": ""}, "FAIL", "webdataset is not installed"),
        ({"deepspeed": "0.18.2"}, "FAIL", "DeepSpeed 0.18.2 keeps only the last"),
    ],
)
def test_versions_are_held_against_those_tested(alone, monkeypatch, changed, verdict, found):
    monkeypatch.setattr(versions, "installed", installed(**changed))
    rows = alone("versions", wards.config_of(None, "train.zero_stage=2"))
    assert verdict in {row[1] for row in rows}
    assert any(re.search(found, row[2]) for row in rows if row[1] == verdict)
    assert (verdict == "FAIL") == any(row[1] == "FAIL" for row in rows)


def test_tested_versions_are_those_that_pip_is_given():
    root = Path(__file__).parents[2]
    assert (root / "constraints.txt").samefile(root / "dalle_dist/constraints.txt")
    assert versions.pins()["torch"] == metadata.version("torch").partition("+")[0]
    assert set(versions.PACKAGES) <= set(versions.pins())


@pytest.mark.parametrize(
    ("verb", "override", "module", "key"),
    [
        ("train", "train.wandb=true", "wandb", "train.wandb"),
        ("train", "train.adamw_backend=apex", "apex", "train.adamw_backend"),
        ("train-clip", "seed=1", "transformers", "train-clip"),
    ],
)
def test_a_package_that_the_config_asks_for_must_be_there(
    alone, monkeypatch, verb, override, module, key
):
    for name in ("wandb", "apex", "apex.optimizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    ((_, verdict, found, wanted),) = alone("packages", wards.config_of(None, override), verb=verb)
    assert (verdict, wanted) == ("FAIL", key)
    assert found.startswith(f"{module}: ")
    assert [row[1] for row in alone("packages", wards.config_of())] == ["ok"]


def other_code(rank):
    wards.own_host(rank)
    if rank == 2:
        sameness.code_hash = lambda: "0" * 12


def test_a_rank_with_other_code_fails():
    rows = run_distributed(wards.rows, 3, ["same code"], None, other_code)
    ((_, verdict, found, _),) = rows[0]
    assert rows[1] == rows[2] == rows[0]
    assert verdict == "FAIL"
    assert found == f"{sameness.code_hash()} on n0 (rank 0), n1 (rank 1); {'0' * 12} on n2 (rank 2)"


def test_the_hash_of_the_code_hangs_on_each_file(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(sameness.dalle_dist, "__file__", str(tmp_path / "__init__.py"))
    before = sameness.code_hash()
    assert sameness.code_hash() == before
    (tmp_path / "a.py").write_text("x = 2")
    assert sameness.code_hash() != before


def other_config(rank):
    wards.own_host(rank)
    return wards.config_of(None, "train.lr=2e-3", "seed=5") if rank == 1 else None


def test_a_rank_with_another_config_fails_and_its_keys_are_named():
    for rows in run_distributed(wards.rows, 3, ["same config"], wards.config_of(), other_config):
        ((_, verdict, found, _),) = rows
        assert verdict == "FAIL"
        assert found.startswith("n1 (rank 1) differs: seed: 0 -> 5; train.lr: ")
