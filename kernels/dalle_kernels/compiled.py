"""One Triton kernel compiled for a GPU that need not be there, and what its instructions say."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from dalle_kernels.occupancy import programs_per_multiprocessor

Used = dict[str, int]
MATRIX = re.compile(r"^\s*(?:wgmma\.mma_async|mma\.sync)", re.MULTILINE)


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    target: int,
) -> Any:
    """Triton's compiled kernel for sm_`target`.

    Args:
        types: of the tensors and of the integers that 16 divides at run time.
        constants: values of the compile-time arguments.
        options: warps, stages, fusion: as the launch gives them.
    """
    names = kernel.arg_names
    scalars = {name: "fp32" for name in names if name not in types and name not in constants}
    source = ASTSource(
        kernel,
        {name: (types | scalars).get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        # As at run time: aligned tensors, strides that 16 divides.
        {(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "at"},
    )
    return triton.compile(source, GPUTarget("cuda", target, 32), options)


def used(compiled: Any, target: int) -> Used:
    """What `resources.json` says of a compiled kernel."""
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    registers, spills = _assemble(compiled.asm["ptx"], compiled.metadata, target)
    return {
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "programs_per_multiprocessor": programs_per_multiprocessor(
            target, warps, registers, shared
        ),
        "matrix_instructions": len(MATRIX.findall(compiled.asm["ptx"])),
    }


def _assemble(ptx: str, metadata: Any, target: int) -> tuple[int, int]:
    """(registers of a thread, spilled bytes): the assembler's own account."""
    match = re.search(r"\.target (\w+)", ptx)
    architecture = match[1] if match else f"sm_{target}"
    fusion = [] if metadata.enable_fp_fusion else ["--fmad=false"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [nvidia.get_ptxas(target).path, "-v", *fusion, f"--gpu-name={architecture}"]
        run = subprocess.run(
            [*command, file.name, "-o", "/dev/null"], capture_output=True, text=True
        )
    registers = re.search(r"Used (\d+) registers", run.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", run.stderr)
    if not registers or not spilled:
        raise RuntimeError(f"ptxas: {run.stderr.strip()[:300]}")
    return int(registers[1]), int(spilled[1])
