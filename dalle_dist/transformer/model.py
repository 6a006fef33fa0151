"""The sparse transformer over one stream of text and image tokens (arXiv 2102.12092, 2.2).

Shape suffixes: B batch, C captions, T text tokens, N image tokens, S = T + N, W width, K codebook
entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dalle_kernels.sparse_attention import BlockCache, DecodeCache
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_dist.config import Config
from dalle_dist.transformer import checks
from dalle_dist.transformer.blocks import Cache, Layer, layer_initials
from dalle_dist.transformer.embeddings import ImageEmbedding, LayerNorm, TextEmbedding, Unembedding
from dalle_dist.transformer.initial import Initial, initialise
from dalle_dist.transformer.layout import counted_indices, layer_masks, text_inputs
from dalle_dist.transformer.protocol import Predictions, TextImageTransformer


class Transformer(TextImageTransformer):
    """The paper's model.

    `blocks` holds the layers; its matrices are the parameters that the paper counts (12.09e9).
    First weights are a function of torch's global seed (`torch.manual_seed`) and their names; on
    the meta device there are none.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = config.transformer
        self.config = config
        scale = shape.width**0.5 if shape.scale_embeddings else 1.0
        self.text_embedding = TextEmbedding(
            config.tokenizer.vocab_size, shape.text_tokens, shape.width, scale
        )
        self.image_embedding = ImageEmbedding(
            shape.codebook_size, shape.image_grid, shape.width, scale
        )
        self.blocks = nn.ModuleList(Layer(shape.width, mask) for mask in layer_masks(shape))
        self.norm = LayerNorm(shape.width)
        self.text_unembedding = Unembedding(shape.width, config.tokenizer.vocab_size)
        self.image_unembedding = Unembedding(shape.width, config.transformer.codebook_size)
        self.start = self.image_embedding.start
        if not self.norm.weight.is_meta:
            initialise(self, self.initials(), torch.initial_seed())

    def predictions(
        self,
        text_BT: Tensor,
        codes_BN: Tensor,
        seen_BN: Tensor | None = None,
        counted_M: Tensor | None = None,
    ) -> Predictions:
        x_BSW = self._stream(text_BT, codes_BN if seen_BN is None else seen_BN)
        text_BTW, image_BNW = x_BSW.split([text_BT.shape[1], codes_BN.shape[1]], dim=1)
        if counted_M is None:
            counted_M = counted_indices(text_BT)
        # Only positions whose target counts are unembedded: most text positions hold pads.
        text_MV = self.text_unembedding(text_BTW.flatten(0, 1).index_select(0, counted_M))
        image_BNK = self.image_unembedding(image_BNW)
        text = text_MV, text_BT.flatten().index_select(0, counted_M)
        return text, (image_BNK.flatten(0, 1), codes_BN.flatten())

    def prefill(
        self,
        text_CT: Tensor,
        samples: Sequence[int],
        prefix_CN: Tensor | None = None,
        window: int | None = None,
    ) -> list[Cache]:
        checks.text_fits(text_CT, self.config)
        checks.ids_fit("text", text_CT, self.config.tokenizer.vocab_size)
        masks = layer_masks(self.config.transformer)
        caches: list[Cache] = [
            DecodeCache(mask, samples) if window is None else BlockCache(mask, samples, window)
            for mask in masks
        ]
        x_CSW = self.text_embedding(text_inputs(text_CT))
        if prefix_CN is not None and prefix_CN.shape[1]:
            x_CSW = torch.cat([x_CSW, self.image_embedding(self._inputs(prefix_CN))], dim=1)
        for layer, cache in zip(self.blocks, caches, strict=True):
            x_CSW = layer.prefill(x_CSW, cache)  # type: ignore[operator]
        return caches

    def step(self, held_BN: Tensor, caches: list[Cache], at: int | Tensor) -> Tensor:
        x_BNW, branch_BNW = self.image_embedding(held_BN, first=at), None
        for layer, cache in zip(self.blocks, caches, strict=True):
            x_BNW, branch_BNW = layer.step(x_BNW, branch_BNW, cache, at)  # type: ignore[operator]
        return self.image_unembedding(self.norm.after(x_BNW, branch_BNW)[1])

    def logits(self, text_BT: Tensor, codes_BN: Tensor) -> tuple[Tensor, Tensor]:
        checks.ids_fit("text", text_BT, self.config.tokenizer.vocab_size)
        checks.ids_fit("codes", codes_BN, self.config.transformer.codebook_size)
        x_BSW = self._stream(text_BT, codes_BN)
        text_BTW, image_BNW = x_BSW.split([text_BT.shape[1], codes_BN.shape[1]], dim=1)
        return self.text_unembedding(text_BTW), self.image_unembedding(image_BNW)

    def attention_size(self) -> int:
        shape = self.config.transformer
        pairs = {mask: int(mask.dense().sum()) for mask in set(layer_masks(shape))}
        return shape.width * sum(pairs[mask] for mask in layer_masks(shape))

    def _stream(self, text_BT: Tensor, codes_BN: Tensor) -> Tensor:
        checks.text_fits(text_BT, self.config)
        checks.codes_fit(codes_BN, len(text_BT), self.config)
        image_BNW = self.image_embedding(self._inputs(codes_BN))
        x_BSW = torch.cat([self.text_embedding(text_inputs(text_BT)), image_BNW], dim=1)
        for layer in self.blocks:
            if self.config.train.checkpoint_activations and self.training:
                # Nothing in a layer is random.
                x_BSW = checkpoint(layer, x_BSW, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BSW = layer(x_BSW)
        return self.norm(x_BSW)

    def _inputs(self, codes_BN: Tensor) -> Tensor:
        start_B1 = torch.full_like(codes_BN[:, :1], self.image_embedding.start)
        return torch.cat([start_B1, codes_BN[:, :-1]], dim=1)

    def initials(self) -> dict[str, Initial]:
        """Embeddings of deviation 0.5 / sqrt(width), layers as `layer_initials` says.

        Unembeddings start at zero: predictions are uniform, and the first loss is ln of the
        vocabulary.
        """
        stem = Initial(std=0.5 * self.config.transformer.width**-0.5)
        found = {"norm.weight": Initial(mean=1.0), "norm.bias": Initial()}
        for embedding in ("text_embedding", "image_embedding"):
            for name, _ in self.get_submodule(embedding).named_parameters(embedding):
                found[name] = stem
        for number, layer in enumerate(self.blocks):
            inside = layer_initials(layer, len(self.blocks))  # type: ignore[arg-type]
            found |= {f"blocks.{number}.{name}": initial for name, initial in inside.items()}
        for unembedding in ("text_unembedding", "image_unembedding"):
            found |= {f"{unembedding}.weight": Initial(), f"{unembedding}.bias": Initial()}
        return found
