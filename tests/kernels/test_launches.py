"""Triton launches on the current device: every launch stands in a block that sets it."""

import ast
from contextlib import nullcontext
from pathlib import Path

import dalle_kernels
import pytest
import torch
from dalle_kernels.devices import launching

FILES = sorted(Path(dalle_kernels.__file__).parent.rglob("triton_*.py"))


def launches(tree, guarded=False):
    """(line, whether it stands in `with launching(...)`) of every call `kernel[grid](...)`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            continue  # a kernel itself launches nothing
        inside = guarded or (
            isinstance(node, ast.With)
            and any(ast.unparse(item).startswith("launching(") for item in node.items)
        )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node.lineno, guarded
        yield from launches(node, inside)


def test_every_launch_is_on_the_device_of_its_tensors():
    found = [
        (file.name, line, guarded)
        for file in FILES
        for line, guarded in launches(ast.parse(file.read_text()))
    ]
    assert len(found) == 12, found
    assert [where for where in found if not where[2]] == []


def test_an_unguarded_launch_is_found():
    tree = ast.parse("with launching(x):\n    kernel[grid](x)\nkernel[grid](x)")
    assert list(launches(tree)) == [(2, True), (3, False)]


def test_the_device_is_the_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or nullcontext()
    )

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 3)

    with launching(OnGpu()), launching(torch.zeros(1)):
        pass
    assert entered == [torch.device("cuda", 3)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")
def test_launches_on_a_device_that_is_not_the_current_one():
    from dalle_kernels.minifloat import pack

    x = torch.randn(1000, device="cuda:1")
    with torch.cuda.device(0):
        assert pack(x, "1-6-9", "triton").equal(pack(x, "1-6-9", "torch"))
