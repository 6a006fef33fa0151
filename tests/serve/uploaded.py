"""An image to send."""

from pathlib import Path

from PIL import Image


def picture(width: int, height: int, folder: Path) -> Path:
    """A PNG of many colours."""
    path = folder / f"{width}x{height}.png"
    ramp = Image.linear_gradient("L").resize((width, height))
    Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)]).save(path)
    return path
