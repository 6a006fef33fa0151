"""Which captions and pictures are left out on request: the paper's filters, and two sizes.

The paper (appendix C) filters its data by a subset of the rules of Sharma et al. 2018 (Conceptual
Captions): captions that are too short, not English, or mainly boilerplate such as "photographed on
DATE", and pictures whose aspect ratio is outside 1/2 to 2. How short is too short it does not say.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from dalle_dist.errors import DataError

PAPER_WORDS, PAPER_LANGUAGE, PAPER_ASPECT = 3, "en", 2.0
SURE = 0.5
MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
DAY = r"\d{1,2}(?:[snrt][tdh])?"
DATE = (
    r"(?:\d{1,4}[-/.]\d{1,2}(?:[-/.]\d{1,4})?|\d{4}"
    rf"|(?:{DAY}\s+)?{MONTH}(?:\s+{DAY})?(?:,?\s*\d{{4}})?)"
)
MADE = (
    r"photographed|photo(?:graph)?|picture|image|taken|captured|shot|uploaded|posted|published"
    r"|created|scanned"
)
BOILERPLATE = re.compile(
    rf"(?:this\s+)?(?:(?:{MADE})\s+)+(?:on|in|at|from)?\s*{DATE}"
    r"|(?:all rights reserved|copyright|\(c\)|©)\s*(?:\d{4})?"
    r"|click (?:here|to enlarge|for (?:more|larger|a larger)[\w ]*)"
    r"|(?:royalty[- ]free|stock) (?:photo|image|picture|vector|illustration)s?"
    r"|(?:photo(?:graph)?|image|picture|courtesy)\s+(?:credit|courtesy|by|of)\b:?"
    r"|image may contain:?|no (?:description|caption|title)(?: available)?|untitled"
    r"|(?:img|dsc|dscn|dscf|image|picture|photo|file|pict|p)[_\- ]?\d{2,}(?:\.\w{3,4})?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Filters:
    """What must hold; None or the default: anything.

    Attributes:
        min_words: of a caption.
        language: ISO 639-1 code of a caption's language.
        drop_boilerplate: whether captions go that are mainly phrases of `BOILERPLATE`.
        max_aspect: longer side over shorter side.
        min_side: pixels of the shorter side.
    """

    min_words: int | None = None
    language: str | None = None
    drop_boilerplate: bool = False
    max_aspect: float | None = None
    min_side: int | None = None

    def check(self) -> None:
        """Raises DataError: senseless numbers, or what tells languages is not installed."""
        low = self.max_aspect is not None and self.max_aspect < 1
        if low or min(self.min_words or 1, self.min_side or 1) < 1:
            raise DataError("--min-words, --min-side and --max-aspect are at least 1")
        if self.language is not None and self.language not in _languages().labels:
            raise DataError(
                f"--language {self.language}: not among {' '.join(_languages().labels)}"
            )

    def lines(self, caption: str) -> tuple[str, str | None]:
        """The lines of a caption that pass, and why the others do not."""
        reasons = [(line, self._against_line(line)) for line in caption.splitlines()]
        kept = "\n".join(line for line, reason in reasons if reason is None)
        return kept, next((reason for _, reason in reasons if reason), None)

    def against_size(self, width: int, height: int) -> str | None:
        """Why a picture of this size is left out."""
        short, long = sorted((width, height))
        if self.max_aspect is not None and long > self.max_aspect * short:
            return f"aspect ratio beyond {self.max_aspect:g}"
        if self.min_side is not None and short < self.min_side:
            return f"shorter side below {self.min_side} pixels"
        return None

    def _against_line(self, line: str) -> str | None:
        if self.min_words is not None and len(line.split()) < self.min_words:
            return f"caption of less than {self.min_words} words"
        if self.drop_boilerplate and _mainly_boilerplate(line):
            return "caption is mainly boilerplate"
        if self.language is not None and _in_another(line, self.language):
            return f"caption not in language {self.language}"
        return None


def _mainly_boilerplate(line: str) -> bool:
    """Whether at most half of its words are left without the phrases."""
    left = BOILERPLATE.sub(" ", line)
    return left != line and 2 * len(re.findall(r"\w+", left)) <= len(re.findall(r"\w+", line))


def _in_another(line: str, language: str) -> bool:
    """Whether it is so more likely than not: two words are in many languages at once."""
    found, probability = _languages().classify(line)
    return found != language and probability > SURE


@functools.cache
def _languages() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise DataError("--language needs another package: pip install py3langid") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
