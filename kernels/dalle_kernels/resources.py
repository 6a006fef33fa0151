"""What the compiled Triton kernels take: registers, spills and shared memory, without a GPU.

python -m dalle_kernels.resources            compile for sm_80 and sm_90, compare with the table
python -m dalle_kernels.resources --write    make the table anew

The table is `kernels/resources.json`, which only the repository has: its figures are those of the
Triton version it names, and it guards changes of the kernels.
Units: registers of a thread, spilled bytes of a thread, bytes of shared memory of a program.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from dalle_kernels.adamw import triton_adamw
from dalle_kernels.generation import triton_generation
from dalle_kernels.masks import AttentionMask
from dalle_kernels.minifloat import FORMATS, triton_minifloat
from dalle_kernels.sparse_attention.decode import DecodeCache
from dalle_kernels.sparse_attention.triton_backward import attention_backward
from dalle_kernels.sparse_attention.triton_config import (
    backward_tiles,
    decode_warps,
    forward_tiles,
)
from dalle_kernels.sparse_attention.triton_decode import attention_decode, decode_constants
from dalle_kernels.sparse_attention.triton_forward import attention_forward
from dalle_kernels.sparse_attention.triton_tiles import mask_constants

TABLE = Path(__file__).parents[1] / "resources.json"
TARGETS = (80, 90)
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
STRIDES = dict.fromkeys(("stride_b", "stride_n", "stride_c", "stride_h"), "i32")
Used = dict[str, int]


def cases() -> Iterator[tuple[str, AttentionMask, int, torch.dtype]]:
    """The paper's three masks at its shape, and the other widths and dtypes."""
    for kind in ("row", "column", "conv"):
        yield f"{kind} D64 bf16", AttentionMask(kind, 256, 32), 64, torch.bfloat16
    row = AttentionMask("row", 256, 32)
    yield "row D64 fp16", row, 64, torch.float16
    yield "row D64 fp32", row, 64, torch.float32
    yield "row D32 bf16", row, 32, torch.bfloat16
    yield "row D128 bf16", row, 128, torch.bfloat16
    yield "row D128 fp32", row, 128, torch.float32
    yield "row D64 bf16, text 77, grid 16", AttentionMask("row", 77, 16), 64, torch.bfloat16


def measure(target: int) -> dict[str, Used]:
    """Compile all cases for sm_`target`: what each kernel takes, by its name."""
    found, capability = {}, (target // 10, target % 10)
    for name, mask, width, dtype in cases():
        tensor, shape = POINTERS[dtype], {**mask_constants(mask), "D": width}
        tiles = forward_tiles(width, dtype)
        signature = {"qkv": tensor, "out": tensor, "lse": "*fp32", **STRIDES}
        found[f"forward {name}"] = _compile(
            attention_forward, signature, shape | tiles.constants(), tiles.options(), target
        )
        tiles = backward_tiles(capability, width, dtype)
        signature = dict.fromkeys(("qkv", "grad", "dqkv"), tensor)
        signature |= dict.fromkeys(("lse", "delta"), "*fp32") | STRIDES
        found[f"backward {name}"] = _compile(
            attention_backward, signature, shape | tiles.constants(), tiles.options(), target
        )
        names = ("q", "k_new", "v_new", "k_text", "v_text", "k_image", "v_image", "out")
        signature = dict.fromkeys(names, tensor) | {"first_C": "*i64", "stride_b": "i32"}
        constants = decode_constants(mask, DecodeCache(mask, [1]).slots, width)
        found[f"decode {name}"] = _compile(
            attention_decode,
            signature,
            constants,
            {"num_warps": decode_warps(width, dtype)},
            target,
        )
    return found | _elementwise(target)


def _elementwise(target: int) -> dict[str, Used]:
    found = {}
    for grad in (torch.float32, torch.bfloat16):
        for moments, pointer in (("fp32", "*fp32"), ("16-bit", "*u16")):
            types = {"param": "*fp32", "grad": POINTERS[grad], "mean": pointer}
            types |= {"variance": pointer, "numel": "i32"}
            constants = {"CLIP": True, "PACKED": pointer == "*u16", "BLOCK": triton_adamw.BLOCK}
            found[f"adamw {moments} moments, grad {POINTERS[grad][1:]}"] = _compile(
                triton_adamw.adamw_update, types, constants, triton_adamw.OPTIONS, target
            )
    for name, tensor in (("bf16", "*bf16"), ("fp32", "*fp32")):
        types = {"x": "*fp32", "total": "*fp32", "branch": tensor}
        types |= dict.fromkeys(("weight", "bias", "out"), tensor)
        constants = {"ADD": True, "WIDTH": 3968, "BLOCK": 4096}
        warps = {"num_warps": triton_generation.norm_warps(4096)}
        found[f"add and layer norm {name}"] = _compile(
            triton_generation.add_norm_rows, types, constants, warps, target
        )
    types = {"seeds": "*i64", "positions": "*i64", "out": "*fp32", "codes": "i32"}
    constants = {"BLOCK": triton_generation.BLOCK}
    found["gumbel"] = _compile(triton_generation.gumbel_noise, types, constants, {}, target)
    for name, fmt in FORMATS.items():
        constants = {"MANTISSA": fmt.mantissa, "BLOCK": triton_minifloat.BLOCK}
        for verb, types in (
            ("pack", {"x": "*fp32", "out": "*u16", "numel": "i32"}),
            ("unpack", {"bits": "*u16", "out": "*fp32", "numel": "i32"}),
        ):
            kernel = getattr(triton_minifloat, f"{verb}_all")
            found[f"{verb} {name}"] = _compile(kernel, types, constants, {}, target)
    return found


def _compile(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any],
    target: int,
) -> Used:  # fmt: skip
    """`types` are of the tensors and strides; the other numbers are the kernels' few scalars."""
    aligned = types
    types = types | dict.fromkeys(("scale", *triton_adamw.SCALARS), "fp32")
    types |= {"at": "*i64"}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        # As at run time: aligned tensors, strides that 16 divides.
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, GPUTarget("cuda", target, 32), options)
    return _assemble(compiled.asm["ptx"], target) | {"shared": compiled.metadata.shared}


def _assemble(ptx: str, target: int) -> Used:
    """The assembler's own account."""
    match = re.search(r"\.target (\w+)", ptx)
    architecture = match[1] if match else f"sm_{target}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [nvidia.get_ptxas(target).path, "-v", f"--gpu-name={architecture}"]
        run = subprocess.run(
            [*command, file.name, "-o", "/dev/null"], capture_output=True, text=True
        )
    used = re.search(r"Used (\d+) registers", run.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", run.stderr)
    if not used or not spilled:
        raise RuntimeError(f"ptxas: {run.stderr.strip()[:300]}")
    return {"registers": int(used[1]), "spills": int(spilled[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the table anew")
    found = {f"sm_{t}": measure(t) for t in TARGETS}
    table = {"triton": triton.__version__, **found}
    if parser.parse_args().write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    for target, kernels in found.items():
        for name, used in kernels.items():
            print(f"{target} {name:44}", *(f"{k} {v}" for k, v in used.items()))
    if not TABLE.is_file():
        raise SystemExit(
            f"no table at {TABLE}: this compares the repository's kernels with its own"
        )
    if table != json.loads(TABLE.read_text()):
        raise SystemExit(f"differs from {TABLE}; --write, and say why in the commit")


if __name__ == "__main__":
    main()
