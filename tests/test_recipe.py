"""The benchmark of the demo's recipe: its runs are kept, its rows say which case they are of."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmarks import rows_of

from benchmarks.busy_machine import write_images

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_recipe_smoke(tmp_path):
    """Two seeds of both stages, and what was done is not done again."""
    write_images(tmp_path / "set")
    command = [sys.executable, "-m", "benchmarks.recipe", str(tmp_path / "folder"), "--smoke",
               "--seeds=2", "--images", str(tmp_path / "set"), "--only", "preset", "image noise 0",
               "--out", str(tmp_path / "rows.csv")]  # fmt: skip
    for _ in range(2):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    rows = rows_of(tmp_path / "rows.csv")
    again = rows[len(rows) // 2 :]
    assert [row["median"] for row in rows[: len(again)]] == [row["median"] for row in again]
    found = {(row["case"], row["metric"]) for row in again}
    assert {case for case, _ in found} == {
        "stage 1 on set: preset", "stage 2 on set: preset", "stage 2 on set: guidance 1",
        "stage 2 on set: guidance 1.5", "stage 2 on set: guidance 3", "stage 2 on set: guidance 4",
        "stage 2 on set: image noise 0",
    }  # fmt: skip
    assert ("stage 2 on set: preset", "identification R@10") in found
    assert {row["runs"] for row in again} == {"2"}
    assert run.stdout.count("done") == 0
    preset = [row for row in again if row["case"] == "stage 2 on set: preset"]
    medians = {row["metric"]: row["median"] for row in preset}
    assert guidance_medians(tmp_path, seeds=2)["guidance 2"] == medians


def guidance_medians(tmp_path, seeds):
    """By weight of guidance and metric, of the recipe's runs of the preset."""
    runs = [str(tmp_path / f"folder/runs/preset-{seed}") for seed in range(seeds)]
    command = [sys.executable, "-m", "benchmarks.guidance", *runs, "--out", str(tmp_path / "g.csv")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {}
    for row in rows_of(tmp_path / "g.csv"):
        assert row["runs"] == str(seeds)
        found.setdefault(row["case"], {})[row["metric"]] = row["median"]
    assert list(found) == [f"guidance {weight}" for weight in ("1", "1.5", "2", "3", "4")]
    return found
