"""Sets of pictures with copies among them, and a small CLIP that has not been trained."""

import pytest
import torch
from copied import CORRUPT_TRAINING, EVALUATED, TRAINING, encoded, evaluated_file, picture, write

from dalle_dist.clip.model import LossCLIP
from dalle_dist.clip.release import save_clip_release
from dalle_dist.config import load
from dalle_dist.text_tokenizer.bpe import train_tokenizer


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """(folder of the evaluation set, folder of the training set)."""
    folder = tmp_path_factory.mktemp("sets")
    training = [
        ("png", b"cut off" if i in CORRUPT_TRAINING else encoded(picture(i)))
        for i in range(TRAINING)
    ]
    training[90] = training[20]  # of two that are equally near the first is the nearest
    write(folder / "train", training, "t")
    write(folder / "evaluated", [evaluated_file(i) for i in range(EVALUATED)], "e")
    return str(folder / "evaluated"), str(folder / "train")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("clip")
    train_tokenizer(["red heart", "blue car"], 290).save(str(folder / "tokenizer.json"))
    config = load(
        "emoji",
        [
            f"paths.tokenizer={folder}/tokenizer.json", "tokenizer.vocab_size=300",
            "clip.image_size=8", "clip.patch_size=4", "clip.image_width=16", "clip.image_layers=2",
            "clip.text_tokens=12", "clip.text_width=16", "clip.text_layers=2", "clip.features=12",
        ],
    )  # fmt: skip
    torch.manual_seed(3)
    save_clip_release(str(folder / "release"), config, LossCLIP(config).eval().state_dict())
    return str(folder / "release")
