"""Pictures come out as a viewer shows them, or with the reason why not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from dalle_dist.data import decode as module
from dalle_dist.data.colour import in_srgb
from dalle_dist.data.decode import decode, decode_or_reason, picture_extensions, read_picture

RAMP = np.arange(16) * 17  # 0, 17, ..., 255


def saved(image, format_, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*chunks, size=(8, 8), rows=None):
    head = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    rows = (b"\0" + b"\xff" * 3 * size[0]) * size[1] if rows is None else rows
    body = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def shades(data):
    return [decode(data).getpixel((x, 0))[0] for x in range(16)]


def rows_of(values):
    return np.repeat(np.asarray(values)[None], 4, 0)


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_gray_of_16_bits_keeps_its_shades(format_):
    data = saved(Image.fromarray(rows_of((RAMP * 257).astype(np.uint16))), format_)
    assert np.abs(np.array(shades(data)) - RAMP).max() <= 1


@pytest.mark.parametrize("scale", [1 / 255, 1, 257])
def test_gray_of_32_bits_keeps_its_shades(scale):
    floats = Image.fromarray(rows_of((RAMP * scale).astype(np.float32)))
    assert np.abs(np.array(shades(saved(floats, "TIFF"))) - RAMP).max() <= 1
    if scale >= 1:
        whole = Image.fromarray(rows_of((RAMP * scale).astype(np.int32)))
        assert np.abs(np.array(shades(saved(whole, "TIFF"))) - RAMP).max() <= 1


def test_gray_of_16_bits_is_white_where_it_is_transparent():
    data = saved(Image.fromarray(rows_of((RAMP * 257).astype(np.uint16))), "PNG")
    body = data.index(b"IDAT") - 4
    data = data[:body] + chunk(b"tRNS", struct.pack(">H", 17 * 257)) + data[body:]
    assert shades(data)[:3] == [0, 255, 34]


@pytest.mark.parametrize("kind", ["palette", "gray", "rgb", "rgba"])
def test_what_is_transparent_is_white(kind):
    if kind == "palette":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        data = saved(image, "PNG", transparency=bytes([255, 0]))
    elif kind == "rgba":
        data = saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP", lossless=True, exact=True)
    else:
        gray = kind == "gray"
        image = Image.new("L" if gray else "RGB", (8, 8), 7 if gray else (7, 7, 7))
        data = saved(image, "PNG", transparency=7 if gray else (7, 7, 7))
    assert decode(data).getpixel((3, 3)) == (255, 255, 255)


def test_cmyk_has_the_colours_of_a_viewer():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixel = decode(saved(red, "JPEG", quality=95)).getpixel((4, 4))
    assert pixel[0] > 240 and max(pixel[1:]) < 15
    assert read_picture(saved(red, "JPEG")).usual is None


def profile(name):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def swapped_profile():
    """sRGB's profile with red and blue exchanged."""
    data = profile("sRGB")
    return (
        data.replace(b"rXYZ", b"????")
        .replace(b"bXYZ", b"rXYZ")
        .replace(b"????", b"bXYZ")
        .replace(b"s\0R\0G\0B", b"x\0y\0z\0w")
        .replace(b"sRGB", b"xyzw")
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_followed(mode):
    image = Image.new("RGB", (8, 8), "red").convert(mode)
    data = saved(image, "PNG", icc_profile=swapped_profile())
    pixel = decode(data).getpixel((3, 3))
    assert pixel[2] > 250 and pixel[0] < 5


@pytest.mark.parametrize("icc", [profile("sRGB"), b"broken" * 30, profile("LAB")])
def test_srgb_and_broken_profiles_change_nothing(icc):
    for colour in ("red", (10, 100, 200)):
        data = saved(Image.new("RGB", (8, 8), colour), "PNG", icc_profile=icc)
        plain = saved(Image.new("RGB", (8, 8), colour), "PNG")
        assert decode(data).tobytes() == decode(plain).tobytes()


def test_srgb_is_not_converted_once_more():
    image = Image.new("RGB", (8, 8))
    assert in_srgb(image, profile("sRGB")) is image
    assert in_srgb(image, swapped_profile()) is not image


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG"])
def test_of_films_the_first_frame(format_):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if format_ == "WEBP" else {}
    data = saved(frames[0], format_, save_all=True, append_images=frames[1:], **lossless)
    assert decode(data).getpixel((3, 3)) == (255, 0, 0)
    assert read_picture(data).usual is None


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_turned_pictures_stand_upright(format_):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(Image.new("RGB", (30, 20)), format_, exif=exif)).size == (20, 30)


def test_broken_exif_costs_nothing():
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x9203, 10, 1, 38)
    tags = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + entry + bytes(4) + struct.pack("<ii", -1, 0)
    data = saved(Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\0\0" + tags)
    assert decode(data).size == (20, 40)
    for junk in (b"not a TIFF header", b"II*\0\xff\xff\xff\xff", b"", b"MM\0*\0\0\0\x08\xff\xff"):
        assert decode(png(chunk(b"eXIf", junk))).size == (8, 8)
        assert decode(saved(Image.new("RGB", (40, 20)), "JPEG", exif=junk)).size == (40, 20)


@pytest.mark.parametrize("place", ["before", "after"])
def test_much_text_costs_nothing(place):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    data = saved(Image.new("RGB", (8, 8), "red"), "PNG", pnginfo=info)
    if place == "after":
        text = b"Comment\0\0" + zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
        data = png()[:-12] + chunk(b"zTXt", text) + chunk(b"IEND", b"")
    picture = read_picture(data)
    assert picture.image.size == (8, 8)
    # Other readers of the same bytes would stumble too.
    assert picture.usual is None


def test_large_pictures_are_read_up_to_a_gigapixel(monkeypatch):
    scan = saved(Image.new("1", (14_000, 14_000)), "PNG")
    monkeypatch.setattr(module, "_shown", lambda opened: Image.new("RGB", opened.size))
    assert decode(scan).size == (14_000, 14_000)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_001, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert decode_or_reason(data) == "too large: 40000 x 25001 pixels"


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_damaged(format_):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), format_)
    for cut in (len(data) // 2, 24):
        assert decode_or_reason(data[:cut]).startswith("damaged: ")
        assert decode(data[:cut]) is None


def test_what_is_no_picture_is_told():
    assert decode_or_reason(b"") == "damaged: the file is empty"
    for data in (b"a text", b"%PDF-1.4\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        assert decode_or_reason(data) == "not a picture"


def test_formats_are_pictures_and_no_documents():
    wanted = {
        "jpg",
        "jpeg",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "avif",
        "jp2",
        "ppm",
    }
    assert wanted <= picture_extensions()
    assert not picture_extensions() & {"pdf", "eps", "ps", "mpg", "h5", "txt", "json"}


def test_usual_files_are_those_of_eight_bits():
    plain = Image.new("RGB", (8, 8))
    for format_, wanted in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", None)):
        assert read_picture(saved(plain, format_)).usual == wanted
    deep = Image.fromarray(rows_of((RAMP * 257).astype(np.uint16)))
    assert read_picture(saved(deep, "PNG")).usual is None
    album = saved(plain, "MPO", save_all=True, append_images=[plain])
    assert read_picture(album).usual == "jpg"
