"""A tiny release, a set of images, and stand-ins for the networks that measure."""

import io

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from tiny_clip import save_clip
from torch import nn

from dalle_dist.data.shards import ShardWriter

# More than a chunk of images, and some captions twice.
CAPTIONS = tiny_run.CAPTIONS + tiny_run.CAPTIONS[:6]


class Inception(nn.Module):
    """The convention of `inception-2015-12-05.pt`, with 72 features and 12 classes."""

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        x = img.to(torch.float32) / 255
        parts = [x.mean((2, 3)), x.std((2, 3)), (x[:, :, 1:] - x[:, :, :-1]).abs().mean((2, 3))]
        features = torch.cat(parts, 1).repeat(1, 8)
        return features if return_features else (20 * features[:, :12]).softmax(1)


class Vgg(nn.Module):
    """The convention of `vgg16.pt`."""

    def forward(self, img, resize_images: bool = True, return_lpips: bool = False):
        return (img / 255).flatten(1)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Folder with release, dvae_run/release, data/held-out, clip and judge (CLIPs), *.pt."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny_run.make(folder)
    tiny_run.save_random_release(folder / "release", config)
    with ShardWriter(str(folder / "data/held-out"), "images", {}, samples_per_shard=30) as writer:
        for i, caption in enumerate(CAPTIONS):
            writer.write(f"{i:03d}", {"png": picture(i), "txt": caption.encode()})
    for seed, name in enumerate(("clip", "judge")):
        save_clip(folder / name, folder / "tokenizer", seed, layers=1, features=6)
    for name, network in (("inception", Inception()), ("vgg", Vgg())):
        torch.jit.script(network).save(str(folder / f"{name}.pt"))
    return folder


def picture(seed, side=16):
    """A PNG of random blocks, so that blur and resizing change it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
