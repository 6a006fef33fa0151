"""One self-contained HTML page: warnings, facts in tables, images inside the file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1680px; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
table { border-collapse: collapse } td { border-top: 1px solid #ddd; padding: .3rem 1rem .3rem 0 }
td { vertical-align: top } td:first-child { white-space: nowrap }
td + td { font-variant-numeric: tabular-nums } img { max-width: 100% }
.warning { color: #c00; font-weight: bold }
"""


@dataclass(frozen=True)
class Section:
    """A heading, then an image, a table, or both."""

    heading: str
    table: Sequence[tuple[str, Any]] = ()
    image: Image.Image | None = None


def page(title: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """HTML text, everything in its order."""
    red = "\n".join(f'<p class="warning">{_text(line)}</p>' for line in warnings)
    body = "\n".join(map(_section, sections))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}'
        f"</title><style>{STYLE}</style></head>\n<body><h1>{_text(title)}</h1>\n"
        f"{red}\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.heading)}</h2>"]
    if section.image is not None:
        parts.append(f'<img alt="{_text(section.heading)}" src="{_data_uri(section.image)}">')
    if section.table:
        rows = (f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in section.table)
        parts.append("\n".join(["<table>", *rows, "</table>"]))
    return "\n".join(parts)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
