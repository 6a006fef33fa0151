"""Losses and sample pictures on what the transformer was not trained on.

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.config import Config
from dalle_dist.data.loader import TokenDataset, collate_tokens
from dalle_dist.data.pictures import grid, to_image
from dalle_dist.distributed.engine import Engine
from dalle_dist.distributed.launch import Ranks
from dalle_dist.dvae.model import DVAE
from dalle_dist.generate.sampler import sample_codes
from dalle_dist.tokenizer import Tokenizer
from dalle_dist.transformer.model import Transformer

MOST = 2_048  # held-out samples per evaluation


class LossTransformer(Transformer):
    """The transformer with its loss as one tensor: text sum, text count, image sum, image count.

    DeepSpeed hooks its gradient work onto the tensors that a forward pass returns and does not look
    into a dataclass: with one, bf16 under ZeRO-1 counts earlier micro-batches twice.
    """

    def forward(self, text_BT: Tensor, codes_BN: Tensor) -> Tensor:  # type: ignore[override]
        # The blocks know their dtypes; DeepSpeed's autocast is on where it reduces in fp16.
        with torch.autocast(text_BT.device.type, enabled=False):
            loss = super().forward(text_BT, codes_BN)
        return torch.stack([loss.text_sum, loss.text_count, loss.image_sum, loss.image_count])


@torch.no_grad()
def held_out_losses(
    engine: Engine, dataset: TokenDataset, micro_batch: int, ranks: Ranks
) -> dict[str, float]:
    """Nats per text and per image token over the held-out set; all ranks share the work.

    Every rank makes the same number of forward passes, as ZeRO-3 gathers weights in each.
    """
    sums = [0.0, 0.0, 0.0, 0.0]
    count = min(MOST, len(dataset))
    engine.module.eval()
    for first in range(0, count, ranks.world * micro_batch):
        start = first + ranks.rank * micro_batch
        mine = range(start, min(start + micro_batch, count))
        text_BT, codes_BN = collate_tokens([dataset[i] for i in mine or [0]])
        parts = engine(text_BT.to(ranks.device), codes_BN.to(ranks.device)).tolist()
        if mine:
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
    engine.module.train()
    text, texts, image, images = ranks.sum(sums)
    return {"held_out_text": text / texts, "held_out_image": image / images}


@torch.no_grad()
def sample_grid(
    model: Transformer, dvae: DVAE, tokenizer: Tokenizer, config: Config, device: torch.device
) -> Image.Image:
    """A row of `samples_per_prompt` pictures per prompt of the config, always by the same seeds.

    The prompt stands above its row.
    """
    each, length = config.train.samples_per_prompt, config.transformer.text_tokens
    side = config.transformer.image_grid
    rows = []
    for number, prompt in enumerate(config.train.prompts):
        ids, _ = tokenizer.encode_padded(prompt, length)
        text_BT = torch.tensor([ids] * each, device=device)
        seeds = [config.seed + number * each + i for i in range(each)]
        codes_BN: Tensor = sample_codes(
            model, text_BT, temperature=1.0, top_k=0, top_p=1.0, seeds=seeds
        )
        pictures_BCHW = dvae.decode(codes_BN.reshape(each, side, side))
        rows.append([to_image(picture) for picture in pictures_BCHW])
    return grid(rows, captions=[[prompt] for prompt in config.train.prompts])
