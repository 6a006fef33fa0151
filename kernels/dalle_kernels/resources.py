"""What the compiled Triton kernels take and ask for, without a GPU.

python -m dalle_kernels.resources            compile for sm_80 and sm_90, compare with the table
python -m dalle_kernels.resources --write    make the table anew

The table is `kernels/resources.json`, which only the repository has: its figures are those of the
Triton version it names, and it guards changes of the kernels. Of each kernel and target:

registers                    of a thread
spills                       bytes of a thread that found no register
shared                       bytes of shared memory of a program
programs_per_multiprocessor  how many are there at a time, by these three and the warps
matrix_instructions          `wgmma` or `mma` in the PTX: lines of text, however often each is run
bytes_moved                  of one launch, loads and stores of global memory that its programs ask
                             for, each time they do (`sparse_attention/traffic.py`)

Launches are those of a layer of the paper's width, 62 heads and 3,968 wide: batch 8 in training
(all parameters in AdamW), 64 samples of one caption in generation, 16 where decoding is split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from dalle_kernels.adamw import triton_adamw
from dalle_kernels.compiled import Used, compile_kernel, used
from dalle_kernels.generation import triton_generation
from dalle_kernels.masks import AttentionMask
from dalle_kernels.minifloat import FORMATS, triton_error_feedback, triton_minifloat
from dalle_kernels.scaled_gradients import triton_scaled_gradients
from dalle_kernels.sparse_attention import traffic, triton_backward, triton_decode, triton_forward
from dalle_kernels.sparse_attention.decode import DecodeCache
from dalle_kernels.sparse_attention.triton_config import (
    backward_tiles,
    decode_warps,
    forward_tiles,
)
from dalle_kernels.sparse_attention.triton_tiles import mask_constants

TABLE = Path(__file__).parents[1] / "resources.json"
TARGETS = (80, 90)
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
STRIDES = dict.fromkeys(("stride_b", "stride_n", "stride_c", "stride_h"), "i32")
PARTS = ("part_top", "part_total", "part_values")
BATCH, HEADS, WIDTH, SAMPLES, CODES = 8, 62, 3_968, 64, 8_192
TOKENS = AttentionMask("row", 256, 32).tokens
PARAMETERS = 12 * WIDTH**2 + 13 * WIDTH  # of both resblocks: six matrices of W x W each, biases


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
    """Compile all cases for sm_`target`: the table's figures, by each kernel's name."""
    found = {}
    for name, mask, width, dtype in cases():
        found[f"forward {name}"] = _forward(target, mask, width, dtype)
        found[f"backward {name}"] = _backward(target, mask, width, dtype)
        found[f"decode {name}"] = _decode(target, mask, width, dtype)
    return found | _split_decoding(target) | _training(target) | _generation(target)


def _forward(target: int, mask: AttentionMask, width: int, dtype: torch.dtype) -> Used:
    tensor, tiles = POINTERS[dtype], forward_tiles(width, dtype)
    types = {"qkv": tensor, "out": tensor, "lse": "*fp32", **STRIDES}
    constants = {**mask_constants(mask), "D": width, **tiles.constants()}
    kernel = triton_forward.attention_forward
    moved = traffic.forward_bytes(mask, tiles, width, dtype.itemsize) * BATCH * HEADS
    return _figures(target, kernel, types, constants, tiles.options(), moved)


def _backward(target: int, mask: AttentionMask, width: int, dtype: torch.dtype) -> Used:
    tensor, capability = POINTERS[dtype], (target // 10, target % 10)
    tiles = backward_tiles(capability, width, dtype, mask)
    types = dict.fromkeys(("qkv", "grad", "dqkv"), tensor)
    types |= dict.fromkeys(("lse", "delta"), "*fp32") | STRIDES
    constants = {**mask_constants(mask), "D": width, **tiles.constants()}
    constants["KEYS_FIRST"] = tiles.keys_first
    kernel = triton_backward.attention_backward
    moved = traffic.backward_bytes(mask, tiles, width, dtype.itemsize) * BATCH * HEADS
    return _figures(target, kernel, types, constants, tiles.options(), moved)


def _decode(
    target: int, mask: AttentionMask, width: int, dtype: torch.dtype, splits: int = 1
) -> Used:
    names = ("q", "k_new", "v_new", "k_text", "v_text", "k_image", "v_image", "out")
    types = dict.fromkeys(names, POINTERS[dtype])
    types |= {"at": "*i64", "first_C": "*i64", "stride_b": "i32"}
    constants = triton_decode.decode_constants(mask, DecodeCache(mask, [1]).slots, width)
    constants["SPLITS"] = splits
    if splits > 1:
        types |= dict.fromkeys(PARTS, "*fp32")
    else:
        constants |= dict.fromkeys(PARTS)
    options = {"num_warps": decode_warps(width, dtype)}
    block, samples = triton_decode.BLOCK, SAMPLES if splits == 1 else SAMPLES // 4
    moved = traffic.decode_bytes(mask, [samples], block, width, dtype.itemsize, splits) * HEADS
    return _figures(target, triton_decode.attention_decode, types, constants, options, moved)


def _merge(target: int, width: int, dtype: torch.dtype, splits: int) -> Used:
    types = dict.fromkeys(PARTS, "*fp32") | {"out": POINTERS[dtype], "rows": "i32"}
    constants = {"SPLITS": splits, "D": width, "ROWS": triton_decode.BLOCK}
    moved = traffic.merge_bytes(width, dtype.itemsize, splits) * HEADS * (SAMPLES // 4)
    return _figures(target, triton_decode.merge_decoded, types, constants, {}, moved)


def _split_decoding(target: int) -> dict[str, Used]:
    found = {}
    for name, mask, width, dtype in cases():
        if name in ("row D64 bf16", "conv D64 bf16", "row D128 fp32"):
            found[f"decode {name}, 4 splits"] = _decode(target, mask, width, dtype, 4)
            found[f"merge {name}, 4 splits"] = _merge(target, width, dtype, 4)
    return found


def _training(target: int) -> dict[str, Used]:
    found = {}
    for grad in (torch.float32, torch.bfloat16):
        for moments, pointer, size in (("fp32", "*fp32", 4), ("16-bit", "*u16", 2)):
            types = {"param": "*fp32", "grad": POINTERS[grad], "mean": pointer}
            types |= {"variance": pointer, "numel": "i32"}
            constants = {"CLIP": True, "PACKED": pointer == "*u16", "BLOCK": triton_adamw.BLOCK}
            found[f"adamw {moments} moments, grad {POINTERS[grad][1:]}"] = _figures(
                target, triton_adamw.adamw_update, types, constants, triton_adamw.OPTIONS,
                PARAMETERS * (8 + grad.itemsize + 4 * size),
            )  # fmt: skip
    for name, fmt in FORMATS.items():
        constants = {"MANTISSA": fmt.mantissa, "BLOCK": triton_minifloat.BLOCK}
        for verb, types in (
            ("pack", {"x": "*fp32", "out": "*u16", "numel": "i32"}),
            ("unpack", {"bits": "*u16", "out": "*fp32", "numel": "i32"}),
        ):
            kernel = getattr(triton_minifloat, f"{verb}_all")
            found[f"{verb} {name}"] = _figures(target, kernel, types, constants, {}, 6 * PARAMETERS)
    return found | _error_feedback(target) | _scaled_gradients(target)


def _error_feedback(target: int) -> dict[str, Used]:
    found = {}
    constants, options = {"BLOCK": triton_error_feedback.BLOCK}, triton_error_feedback.OPTIONS
    types = {"values": "*fp32", "codes": "*u16", "numel": "i32", "stride": "i32"}
    for name, kernel, other, moved in (
        ("add decoded 1-6-9", triton_error_feedback.add_decoded_blocks, "factor", 10),
        ("encode rest 1-6-9", triton_error_feedback.encode_rest_blocks, "sent", 14),
    ):
        given = types | {other: "*fp32"}
        moved *= PARAMETERS
        found[name] = _figures(target, kernel, given, constants, options, moved)
    return found


def _scaled_gradients(target: int) -> dict[str, Used]:
    found = {}
    constants, options = {"BLOCK": triton_scaled_gradients.BLOCK}, triton_scaled_gradients.OPTIONS
    for name, kernel, out in (
        ("filter and scale fp16", triton_scaled_gradients.filter_and_scale_all, torch.float16),
        ("unscale and filter", triton_scaled_gradients.unscale_and_filter_all, torch.float32),
    ):
        types = {"grad": "*fp32", "scale": "*fp32", "out": POINTERS[out], "numel": "i32"}
        moved = BATCH * TOKENS * WIDTH * (4 + out.itemsize)
        found[name] = _figures(target, kernel, types, constants, options, moved)
    return found


def _generation(target: int) -> dict[str, Used]:
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        types = {"x": "*fp32", "total": "*fp32"}
        types |= dict.fromkeys(("branch", "weight", "bias", "out"), POINTERS[dtype])
        constants = {"ADD": True, "WIDTH": WIDTH, "BLOCK": triton.next_power_of_2(WIDTH)}
        options = {"num_warps": triton_generation.norm_warps(constants["BLOCK"])}
        found[f"add and layer norm {name}"] = _figures(
            target, triton_generation.add_norm_rows, types, constants, options,
            SAMPLES * WIDTH * (8 + 4 * dtype.itemsize),
        )  # fmt: skip
    types = {"seeds": "*i64", "positions": "*i64", "out": "*fp32", "codes": "i32"}
    constants = {"BLOCK": triton_generation.BLOCK}
    # A seed and a position are 8 bytes each, the same for all lanes of a program.
    moved = SAMPLES * (4 * CODES + 16 * triton.cdiv(CODES, triton_generation.BLOCK))
    kernel = triton_generation.gumbel_noise
    return found | {"gumbel": _figures(target, kernel, types, constants, {}, moved)}


def _figures(
    target: int, kernel: Any, types: dict[str, str], constants: dict[str, Any],
    options: dict[str, Any], bytes_moved: int,
) -> Used:  # fmt: skip
    compiled = compile_kernel(kernel, types, constants, options, target)
    return used(compiled, target) | {"bytes_moved": bytes_moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the table anew")
    found = {f"sm_{t}": measure(t) for t in TARGETS}
    table = {"triton": triton.__version__, **found}
    if parser.parse_args().write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    for target, kernels in found.items():
        for name, figures in kernels.items():
            print(f"{target} {name:44}", *(f"{k} {v}" for k, v in figures.items()))
    if not TABLE.is_file():
        raise SystemExit(
            f"no table at {TABLE}: this compares the repository's kernels with its own"
        )
    if table != json.loads(TABLE.read_text()):
        raise SystemExit(f"differs from {TABLE}; --write, and say why in the commit")


if __name__ == "__main__":
    main()
