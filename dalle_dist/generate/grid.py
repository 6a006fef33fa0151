"""Sample images of the config's prompts, to look at while training.

Shape suffixes: B batch, T text positions, N image tokens, C channels, H and W pixels.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.config import Config
from dalle_dist.data.labelled_grid import grid, to_image
from dalle_dist.generate.sampler import sample_codes, warn_if_never_empty
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.image_tokenizer.protocol import ImageTokenizer
from dalle_dist.text_tokenizer.protocol import TextTokenizer
from dalle_dist.transformer.protocol import TextImageTransformer


@torch.no_grad()
def sample_grid(
    model: TextImageTransformer,
    image_tokenizer: ImageTokenizer,
    tokenizer: TextTokenizer,
    config: Config,
    device: torch.device,
) -> Image.Image:
    """A row of `samples_per_prompt` images per prompt of the config, always by the same seeds.

    The prompt stands above its row. Sampling options are the config's.
    """
    sampling = Sampling.of(config.sampling)
    warn_if_never_empty(config, sampling)
    each, length = config.train.samples_per_prompt, config.transformer.text_tokens
    rows = []
    for number, prompt in enumerate(config.train.prompts):
        ids, _ = tokenizer.encode_padded(prompt, length)
        text_BT = torch.tensor([ids] * each, device=device)
        seeds = [config.seed + number * each + i for i in range(each)]
        codes_BN: Tensor = sample_codes(model, text_BT, seeds, sampling)
        rows.append([to_image(image) for image in image_tokenizer.decode(codes_BN)])
    return grid(rows, captions=[[prompt] for prompt in config.train.prompts])
