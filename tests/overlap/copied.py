"""Smooth pictures, and copies of them as they are found on the internet."""

import io

import numpy as np
from PIL import Image

from dalle_dist.data.shards import ShardWriter

TRAINING, EVALUATED = 150, 140  # three blocks each: two ranks have them in another order
CORRUPT_TRAINING, CORRUPT_EVALUATED = (3, 70, 149), (5,)
# Evaluated image -> the training image that it is a copy of, and how it was copied.
COPIES = {0: (64, "jpeg"), 9: (0, "resized"), 66: (148, "jpeg"), 139: (100, "resized")}


def picture(seed):
    """Smooth, as photographs are: a copy has other pixels and the same look."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)


def encoded(image, format_="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()


def evaluated_file(number):
    """(extension, content) of an evaluated image."""
    if number in CORRUPT_EVALUATED:
        return "png", b"no image"
    if number not in COPIES:
        return "png", encoded(picture(1000 + number))
    origin, how = COPIES[number]
    if how == "jpeg":
        return "jpg", encoded(picture(origin), "jpeg", quality=80)
    return "png", encoded(picture(origin).resize((37, 37), Image.Resampling.LANCZOS))


def write(folder, files, name):
    with ShardWriter(str(folder), "images", {}, samples_per_shard=40) as writer:
        for number, (extension, content) in enumerate(files):
            caption = f"{name}, picture <{number}>"
            writer.write(f"{name}{number:04d}", {extension: content, "txt": caption.encode()})
