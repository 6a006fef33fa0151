"""Completion: what is kept of an image, to the token; what does not fit is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_dist import Generator
from dalle_dist.cli import main
from dalle_dist.errors import UserError
from dalle_dist.generate.completion import kept_region, kept_rows
from dalle_dist.generate.sampler import FREE


class Cells:
    """4 x 4 codes of an image of 8 x 8 pixels: the red value of each cell's first pixel."""

    image_size, grid, codebook_size = 8, 4, 256

    def encode(self, images_BCHW):
        return (images_BCHW[:, 0, ::2, ::2] * 255).round().long().flatten(1)


def picture(width=8, height=8):
    red = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    return Image.fromarray(np.stack([red] * 3, axis=2))


def grid_of(kept):
    return kept.codes_N.unflatten(0, (4, 4)).tolist()


def mask_of(rows, scale=2):
    pixels = np.kron(np.array(rows, dtype=np.uint8) * 255, np.ones((scale, scale), np.uint8))
    return Image.fromarray(pixels)


def test_rows_are_kept():
    assert grid_of(kept_rows(Cells(), picture(), 2)) == [
        [0, 2, 4, 6], [16, 18, 20, 22], [FREE] * 4, [FREE] * 4
    ]  # fmt: skip
    for rows in (0, 4, -1):
        with pytest.raises(UserError, match=f"--rows: {rows} is not in 1 to 3"):
            kept_rows(Cells(), picture(), rows)


@pytest.mark.parametrize("scale", [1, 2, 6, 30])
def test_a_mask_of_any_size_keeps_what_is_white(scale):
    shape = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]
    kept = grid_of(kept_region(Cells(), picture(), mask_of(shape, scale)))
    assert [[code != FREE for code in row] for row in kept] == [[bool(c) for c in r] for r in shape]
    assert kept[1][1] == 18 and kept[2][3] == 38


def test_a_token_is_kept_only_if_all_its_pixels_are_white():
    mask = mask_of([[1, 1, 1, 1]] * 2 + [[0] * 4] * 2)
    mask.putpixel((3, 2), 0)
    assert grid_of(kept_region(Cells(), picture(), mask))[:2] == [[0, 2, 4, 6], [16, FREE, 20, 22]]


def test_a_mask_is_cut_to_the_square_that_the_image_is_cut_to():
    wide = picture(16, 8)
    mask = Image.new("L", (16, 8))
    mask.paste(255, (4, 0, 8, 8))
    kept = grid_of(kept_region(Cells(), wide, mask))
    assert [[code != FREE for code in row] for row in kept] == [[True, True, False, False]] * 4
    assert kept[1][0] == 36


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (8, 8)), "keeps none of the 4 x 4 tokens"),
        (Image.new("L", (8, 8), 255), "keeps all of the 4 x 4 tokens"),
        (Image.new("L", (8, 4), 255), "8 x 4 pixels have not the proportions of the image, 8 x 8"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, message):
    with pytest.raises(UserError, match=f"--keep-mask: {message}"):
        kept_region(Cells(), picture(), mask)


def test_given_tokens_are_kept_to_the_token(release, tmp_path):
    generator = Generator.load(release(), device="cpu")
    side, size = generator.image_tokenizer.grid, generator.image_tokenizer.image_size
    image = generator.generate("red heart", seed=1)[0].image
    own_N = generator.image_tokenizer.encode(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    )[0]
    free = generator.generate("blue car", n=3, seed=2)
    for window in (1, 4):
        made = generator.complete(image, "blue car", rows=1, n=3, seed=2, window=window)
        for image_, other in zip(made, free, strict=True):
            assert image_.codes_N[:side].equal(own_N[:side])
            assert image_.entry != other.entry
        mask = Image.new("L", (size, size))
        mask.paste(255, (size // 2, 0, size, size))
        made = generator.complete(image, "blue car", keep_mask=mask, n=3, seed=2, window=window)
        for image_ in made:
            grid, own = (x.unflatten(0, (side, side)) for x in (image_.codes_N, own_N))
            assert grid[:, side // 2 :].equal(own[:, side // 2 :])
    assert len({tuple(image_.codes_N.tolist()) for image_ in made}) > 1
    with pytest.raises(UserError, match="either --rows or a --keep-mask"):
        generator.complete(image, "blue car")


def test_the_command_completes(release, tmp_path, capsys):
    release, out = release(), tmp_path / "out"
    image = tmp_path / "heart.png"
    Generator.load(release, device="cpu").generate("red heart")[0].image.save(image)
    command = ["complete", release, str(image), "blue car", "-n", "2", "-o", str(out)]
    assert main([*command, "--rows", "1"]) == 0
    mask = tmp_path / "mask.png"
    Image.new("L", (4, 4), 255).save(mask)
    assert main([*command, "--keep-mask", str(mask)]) == 2
    assert "--keep-mask: keeps all of the" in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main(["complete", release, str(tmp_path / "broken.png"), "x", "--rows", "1"]) == 2
    assert "broken.png: not an image that can be decoded" in capsys.readouterr().err
    found = json.loads((out / "manifest.json").read_text())["images"]
    assert len(found) == 2 and len({entry["kept"] for entry in found}) == 1
