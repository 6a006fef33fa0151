"""A CLIP of a few thousand weights that has not been trained, for the tests that score by one."""

import torch

from dalle_dist.clip.model import LossCLIP
from dalle_dist.clip.release import save_clip_release
from dalle_dist.config import load
from dalle_dist.text_tokenizer.bpe import train_tokenizer


def make_clip(folder, captions):
    """(config, the CLIP in memory, its release folder, its fingerprint)."""
    train_tokenizer(captions, 290).save(str(folder / "tokenizer.json"))
    config = load(
        "emoji",
        [
            f"paths.tokenizer={folder}/tokenizer.json", "tokenizer.vocab_size=300",
            "clip.image_size=8", "clip.patch_size=4", "clip.image_width=16", "clip.image_layers=2",
            "clip.text_tokens=12", "clip.text_width=16", "clip.text_layers=2", "clip.features=12",
        ],
    )  # fmt: skip
    torch.manual_seed(3)
    clip = LossCLIP(config).eval()
    digest = save_clip_release(str(folder / "release"), config, clip.state_dict())
    return config, clip, folder / "release", digest
