"""The CLIP that is trained here: `transformers`' networks of a config, with their loss.

Shape suffixes: B pairs of this rank, N pairs of all ranks, C channels, H and W pixels, T text
positions, D features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dalle_dist.clip.hugging_face import library
from dalle_dist.clip.loss import contrastive_loss
from dalle_dist.config import Config
from dalle_dist.distributed.gather_rows import gather_rows
from dalle_dist.text_tokenizer.protocol import PAD, START

MEAN, STD = 0.5, 0.5  # of the pixels, by which they are normalised
FIRST_LOGIT_SCALE = math.log(1 / 0.07)  # arXiv 2103.00020, 2.5
LARGEST_LOGIT_SCALE = math.log(100)  # the same place


def end_of_text(config: Config) -> int:
    """The id after those of the text tokenizer: its own, since a pad or a start is something else.

    It is above 2, which `transformers` takes for an old file and looks for the highest id instead.
    """
    return config.tokenizer.vocab_size


def hugging_face_config(config: Config) -> Any:
    """The `transformers.CLIPConfig` of our config."""
    shape = config.clip
    text = {
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_heads,
        "projection_dim": shape.features,
        "max_position_embeddings": shape.text_tokens,
        "vocab_size": end_of_text(config) + 1,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": end_of_text(config),
    }
    image = {
        "hidden_size": shape.image_width,
        "intermediate_size": 4 * shape.image_width,
        "num_hidden_layers": shape.image_layers,
        "num_attention_heads": shape.image_heads,
        "projection_dim": shape.features,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
    }
    return library().CLIPConfig(
        text_config=text,
        vision_config=image,
        projection_dim=shape.features,
        logit_scale_init_value=FIRST_LOGIT_SCALE,
    )


class LossCLIP(nn.Module):
    """A CLIP whose forward pass gives its share of the contrastive loss.

    Its parameters have the names that they have in `transformers.CLIPModel`, and their shapes but
    for `logit_scale`, of shape [1] here. They belong to it and its parts directly: ZeRO-3 gathers
    for a module's forward pass only what is the module's own.

    Args:
        bf16: compute under bf16 autocast; the weights stay as they are.

    Raises UserError where `transformers` is not installed.
    """

    def __init__(self, config: Config, bf16: bool = False) -> None:
        super().__init__()
        model = library().CLIPModel(hugging_face_config(config))
        # DeepSpeed cannot broadcast a parameter without axes.
        self.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
        self.text_model, self.vision_model = model.text_model, model.vision_model
        self.visual_projection = model.visual_projection
        self.text_projection = model.text_projection
        self._bf16 = bf16

    def forward(self, images_BCHW: Tensor, text_BT: Tensor, captions_B: Tensor) -> Tensor:
        """(sum over this rank's pairs of the loss in nats, factor on the cosines).

        The loss is that among the pairs of all ranks: a collective call, as is its backward pass.

        Args:
            images_BCHW: floats in [0, 1].
            text_BT: ids of `caption_ids`.
            captions_B: int64, the same for the same caption (`hashed`).
        """
        both_B2D = torch.stack([self.images(images_BCHW), self.captions(text_BT)], dim=1)
        both_N2D = gather_rows(both_B2D)
        captions_N = gather_rows(captions_B)
        # Once there it stays there: nothing beyond the bound has a gradient.
        scale = self.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp().squeeze()
        loss = contrastive_loss(both_B2D, both_N2D, captions_B, captions_N, scale)
        return torch.stack([loss, scale.detach()])

    def images(self, images_BCHW: Tensor) -> Tensor:
        """Features of length 1, fp32: image_BD, from floats in [0, 1]."""
        with self._autocast(images_BCHW):
            seen = self.vision_model(pixel_values=(images_BCHW - MEAN) / STD)
            image_BD = self.visual_projection(seen.pooler_output)
        return normalize(image_BD.float(), dim=-1)

    def captions(self, text_BT: Tensor) -> Tensor:
        """Features of length 1, fp32: text_BD, from ids of `caption_ids`."""
        with self._autocast(text_BT):
            text_BD = self.text_projection(self.text_model(input_ids=text_BT).pooler_output)
        return normalize(text_BD.float(), dim=-1)

    def _autocast(self, inputs: Tensor) -> torch.autocast:
        return torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._bf16)


def decayed(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: all but gains and biases (2103.00020, 2.5)."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
