"""The Triton kernels on any node: interpreted, and compiled for GPUs that need not be there.

The interpreter is chosen by the environment before the kernels are decorated, so its tests run in
a process of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="triton is not installed: make .venv/triton")


def interpreted(file, marks="not slow"):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-m", marks, str(HERE / file)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "marks", "tests"),
    [
        ("interpreted_attention.py", "not slow", 19),
        ("interpreted_decode.py", "not slow", 15),
        ("interpreted_traffic.py", "not slow", 13),
        pytest.param("interpreted_attention.py", "slow", 56, marks=pytest.mark.slow),
        pytest.param("interpreted_decode.py", "slow", 40, marks=pytest.mark.slow),
    ],
)
def test_interpreted(file, marks, tests):
    run = interpreted(file, marks)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= tests, run.stdout[-500:]


@pytest.mark.slow
def test_compiled_kernels_take_what_the_table_says():
    import triton
    from dalle_kernels import resources

    table = json.loads(resources.TABLE.read_text())
    found = {f"sm_{target}": resources.measure(target) for target in resources.TARGETS}
    assert all(used["spills"] == 0 for used in found["sm_90"].values()), found["sm_90"]
    assert table["triton"] == triton.__version__, "run resources --write"
    assert found == {target: table[target] for target in found}
