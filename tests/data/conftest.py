import io

import pytest
from PIL import Image


@pytest.fixture
def image():
    """image(channel, size, format) -> the bytes of a plain image."""

    def make(colour="red", size=(8, 8), format_="PNG", mode="RGB"):
        buffer = io.BytesIO()
        Image.new(mode, size, colour).save(buffer, format=format_)
        return buffer.getvalue()

    return make
