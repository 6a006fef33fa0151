"""The library `transformers`, which has CLIP's networks: an extra, imported when it is needed."""

from __future__ import annotations

from typing import Any

from dalle_dist.errors import UserError


def library() -> Any:
    """The module `transformers`. Raises UserError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "CLIP needs the package transformers: pip install 'dalle-dist[clip]'"
        ) from None
    return transformers
