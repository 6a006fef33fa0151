"""Images that are sent are those that `complete` reads from files."""

import base64
import io

import pytest
from PIL import Image
from uploaded import picture

from dalle_dist.data.decode import decode
from dalle_dist.serve.uploads import image_of


def rotated(image, file):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(file, "JPEG", exif=exif)


@pytest.mark.parametrize(
    "save",
    [
        lambda image, file: image.save(file, "PNG"),
        lambda image, file: image.save(file, "WEBP", lossless=True),
        lambda image, file: image.convert("P").save(file, "PNG", transparency=3),
        lambda image, file: image.convert("LA").save(file, "PNG"),
        lambda image, file: image.convert("CMYK").save(file, "JPEG"),
        rotated,
    ],
    ids=["png", "webp", "palette", "grey and alpha", "cmyk", "rotated"],
)
def test_an_image_is_that_of_its_file(tmp_path, save):
    file = io.BytesIO()
    with Image.open(picture(24, 16, tmp_path)) as image:
        save(image, file)
    sent = image_of("image", base64.b64encode(file.getvalue()).decode(), 24 * 16)
    expected = decode(file.getvalue())
    assert sent.mode == "RGB" and sent.tobytes() == expected.tobytes()
    assert sent.size == ((16, 24) if save is rotated else (24, 16))
