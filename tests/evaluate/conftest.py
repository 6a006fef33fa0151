"""A tiny release, a set of images, and stand-ins for the networks that measure."""

import io

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from torch import nn

from dalle_dist.checkpoint.release import save_release
from dalle_dist.clip.model import LossCLIP
from dalle_dist.clip.release import save_clip_release
from dalle_dist.config import load
from dalle_dist.data.shards import ShardWriter
from dalle_dist.transformer.model import Transformer

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
    torch.manual_seed(3)
    state = Transformer(config).state_dict()
    weights = {name: 0.3 * torch.randn(values.shape) for name, values in state.items()}
    dvae = f"{config.paths.dvae_run}/release"
    save_release(str(folder / "release"), config, weights, config.paths.tokenizer, dvae)
    with ShardWriter(str(folder / "data/held-out"), "images", {}, samples_per_shard=30) as writer:
        for i, caption in enumerate(CAPTIONS):
            writer.write(f"{i:03d}", {"png": picture(i), "txt": caption.encode()})
    for seed, name in enumerate(("clip", "judge")):
        _save_clip(folder, name, seed)
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


def _save_clip(folder, name, seed):
    config = load(
        "emoji",
        [
            f"paths.tokenizer={folder}/tokenizer", "tokenizer.vocab_size=300",
            "clip.image_size=8", "clip.patch_size=4", "clip.image_width=16", "clip.image_layers=1",
            "clip.text_tokens=12", "clip.text_width=16", "clip.text_layers=1", "clip.features=6",
        ],
    )  # fmt: skip
    torch.manual_seed(seed)
    clip = LossCLIP(config).eval()
    save_clip_release(str(folder / name), config, clip.state_dict())
