"""Values that an option may have, each list once: for the config, and for the code that obeys it.

Read without torch, so that `dalle-dist --help` need not wait for it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Architecture = Literal["paper", "rudalle", "dalle-pytorch", "mindalle"]
BetweenNodes = Literal["zero", "dense", "powersgd", "diloco"]
CommDtype = Literal["fp32", "bf16", "fp16", "1-6-9"]
ErrorDtype = Literal["fp32", "1-6-9"]
EMAPlace = Literal["device", "host"]
GeneratePrecision = Literal["fp32", "bf16", "fp16"]
GuidanceSchedule = Literal["constant", "linear", "cosine"]
MaskPattern = Literal["paper", "causal"]
MaskVariant = Literal["paper", "clamp", "torus", "dalle-pytorch"]
Moments = Literal["fp32", "16-bit"]
OuterDtype = Literal["fp32", "bf16", "fp16", "int8"]
Precision = Literal["auto", "fp16", "bf16", "fp32"]
AdamWBackend = Literal["auto", "torch", "triton", "apex"]
ProductFormat = Literal["tf32", "fp32"]
RankOf = Literal["node", "shard"]
Skip = Literal["step", "block"]
OnSpike = Literal["warn", "rollback"]
ZeROStage = Literal[0, 1, 2, 3]


def values(choice: Any) -> tuple[Any, ...]:
    """The values of one of the above, in their order."""
    return get_args(choice)
