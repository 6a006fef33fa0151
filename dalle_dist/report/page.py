"""One self-contained HTML page: figures in a table, images inside the file."""

from __future__ import annotations

import base64
import html
import io
import platform
from typing import Any

import torch
from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1280px; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
table { border-collapse: collapse } td { border-top: 1px solid #ddd; padding: .3rem 1rem .3rem 0 }
td + td { font-variant-numeric: tabular-nums } img { max-width: 100% } footer { color: #777 }
"""


def page(title: str, figures: dict[str, Any], images: dict[str, Image.Image]) -> str:
    """HTML text; `figures` and `images` are shown in their order, under their names."""
    rows = "\n".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in figures.items())
    sections = "\n".join(
        f'<h2>{_text(name)}</h2>\n<img alt="{_text(name)}" src="{_data_uri(image)}">'
        for name, image in images.items()
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    made = f"Python {platform.python_version()}, torch {torch.__version__}, report made on {device}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}'
        f"</title><style>{STYLE}</style></head>\n<body><h1>{_text(title)}</h1>\n"
        f"<table>\n{rows}\n</table>\n{sections}\n<footer><p>{_text(made)}</p></footer>"
        "</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
