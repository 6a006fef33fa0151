"""The release folder of train-clip: a CLIP in Hugging Face's format, as `CLIPScorer` loads any.

config.json, model.safetensors, preprocessor_config.json, tokenizer.json, tokenizer_config.json, and
our config.yaml. `transformers.CLIPModel` and `AutoTokenizer` load it as it is.
"""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from dalle_dist import storage
from dalle_dist.checkpoint.formats import State, save_tensors
from dalle_dist.checkpoint.names import CONFIG
from dalle_dist.checkpoint.release import TOKENIZER_FILE
from dalle_dist.clip.model import LARGEST_LOGIT_SCALE, MEAN, STD, hugging_face_config
from dalle_dist.config import Config, to_yaml
from dalle_dist.text_tokenizer.bpe import END, SPECIAL, with_end

MODEL_CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREPROCESSOR, TOKENIZER_CONFIG = "preprocessor_config.json", "tokenizer_config.json"


def save_clip_release(folder: str, config: Config, state: State) -> str:
    """Write the release folder, config.yaml last; returns the weights' fingerprint.

    The text tokenizer is that of `paths.tokenizer`.
    """
    scale = state["logit_scale"].clamp(max=LARGEST_LOGIT_SCALE).reshape(())
    state = {**state, "logit_scale": scale}
    model = hugging_face_config(config)
    model.architectures = ["CLIPModel"]
    tokenizer = with_end(config.paths.tokenizer, config.tokenizer.vocab_size)
    files = {
        MODEL_CONFIG: model.to_json_string(),
        PREPROCESSOR: json.dumps(_preprocessor(config), indent=1),
        TOKENIZER_FILE: tokenizer,
        TOKENIZER_CONFIG: json.dumps(_tokenizer(config), indent=1),
    }
    for name, text in files.items():
        storage.write_bytes(storage.join(folder, name), text.encode())
    digest = save_tensors(storage.join(folder, WEIGHTS), state, {"format": "pt"})
    storage.write_bytes(storage.join(folder, CONFIG), to_yaml(config).encode())
    return digest


def _preprocessor(config: Config) -> dict[str, Any]:
    """What `data.augment.centre` does to a square image that is no smaller than the CLIP's."""
    size = config.clip.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BOX),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }


def _tokenizer(config: Config) -> dict[str, Any]:
    pad, start = SPECIAL
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.clip.text_tokens,
        "padding_side": "right",
        "truncation_side": "right",
        "pad_token": pad,
        "bos_token": start,
        "eos_token": END,
        # A caption that spells "<pad>" is text like any other, as in training.
        "split_special_tokens": True,
        # tokenizer.json says so too, but transformers 4 overrules it.
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": False,
    }
