"""A CLIP of a few thousand weights that has not been trained, for the tests that score by one."""

import torch

from dalle_dist.clip.model import LossCLIP
from dalle_dist.clip.release import save_clip_release
from dalle_dist.config import load
from dalle_dist.text_tokenizer.bpe import train_tokenizer


def make_clip(folder, captions):
    """(config, the CLIP in memory, its release folder, its fingerprint)."""
    train_tokenizer(captions, 290).save(str(folder / "tokenizer.json"))
    return save_clip(folder / "release", folder / "tokenizer.json", seed=3, layers=2, features=12)


def save_clip(release, tokenizer, seed, layers, features):
    """What `make_clip` returns, of random weights."""
    config = load(
        "emoji",
        [
            f"paths.tokenizer={tokenizer}", "tokenizer.vocab_size=300",
            "clip.image_size=8", "clip.patch_size=4", "clip.text_tokens=12",
            "clip.image_width=16", f"clip.image_layers={layers}",
            "clip.text_width=16", f"clip.text_layers={layers}", f"clip.features={features}",
        ],
    )  # fmt: skip
    torch.manual_seed(seed)
    clip = LossCLIP(config).eval()
    return config, clip, release, save_clip_release(str(release), config, clip.state_dict())
