"""What a call of `dalle-dist evaluate` asks for; read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dalle_dist.choices import GeneratePrecision
from dalle_dist.errors import ConfigError

MOST_CANDIDATES = 2**20


@dataclass(frozen=True)
class Options:
    """Fields as the command line's options.

    Raises ConfigError: options that contradict one another or are out of their range.
    """

    release: str
    data: str
    out: str = "evaluation"
    inception: str | None = None
    inception_resize: str = "tf1-bilinear"
    clip: str | None = None
    score_clip: str | None = None
    rerank: str | None = None
    lpips: str | None = None
    candidates: int = 1
    captions: int | None = None
    size: int | None = None
    filter: str = "box"
    reference: str | None = None
    save_reference: str | None = None
    named: str | None = None
    seed: int = 0
    batch_size: int = 64
    precision: GeneratePrecision = "fp32"
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("candidates", "captions", "size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: {value} is below 1")
        if self.candidates & (self.candidates - 1) or self.candidates > MOST_CANDIDATES:
            raise ConfigError(
                f"--candidates: {self.candidates} is not one of 1, 2, 4 ... {MOST_CANDIDATES:,}"
            )
        if (self.candidates > 1) != (self.rerank is not None):
            raise ConfigError(
                "--candidates above 1 and --rerank need one another: which CLIP is to choose, and "
                "of how many"
            )
        if not (self.inception or self.clip):
            for name in ("reference", "save_reference"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} needs a feature network: --inception or --clip"
                    )
