"""Measures of train-clip on held-out pairs, the work shared by all ranks.

Shape suffixes: B pairs of a batch, N pairs of all ranks, C channels, H and W pixels, T text
positions, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle_dist.clip.loss import contrastive_loss
from dalle_dist.clip.model import LARGEST_LOGIT_SCALE, LossCLIP
from dalle_dist.config import Config
from dalle_dist.data.image_dataset import ImageDataset, ImageSample
from dalle_dist.data.loader import Samples
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.train.state import TrainingState

MEASURED = 1024  # held-out pairs of one evaluation, at most: retrieval among more is harder
BATCH = 64
Encoded = tuple[Tensor, Tensor, Tensor]  # images_BCHW uint8, text_BT, captions_B


class HeldOutPairs:
    """The first held-out pairs; each rank reads and encodes its share of them."""

    def __init__(
        self,
        dataset: ImageDataset,
        encode: Callable[[Samples[ImageSample]], Encoded],
        ranks: Ranks,
    ) -> None:
        mine = range(ranks.rank, min(MEASURED, len(dataset)), ranks.world)
        self._mine = [
            encode([dataset[i] for i in mine[start : start + BATCH]])
            for start in range(0, len(mine), BATCH)
        ]
        self._ranks = ranks

    def features(self, clip: LossCLIP) -> Encoded:
        """image_ND, text_ND and captions_N, in the data set's order, on every rank's CPU.

        A collective call.

        Args:
            clip: the same on all ranks.
        """
        found = [self._features(clip, *batch) for batch in self._mine]
        shares = self._ranks.gather([torch.cat(parts) for parts in zip(*found, strict=True)])
        shares = [share for share in shares if share]  # fewer pairs than ranks
        image_ND, text_ND, captions_N = (
            _interleaved([share[part] for share in shares]) for part in range(3)
        )
        return image_ND, text_ND, captions_N

    @torch.no_grad()
    def _features(
        self, clip: LossCLIP, images_BCHW: Tensor, text_BT: Tensor, captions_B: Tensor
    ) -> Encoded:
        device = self._ranks.device
        image_BD = clip.images(images_BCHW.to(device).float() / 255)
        return image_BD.cpu(), clip.captions(text_BT.to(device)).cpu(), captions_B

    def measure(self, clip: LossCLIP) -> dict[str, float]:
        """How well images and captions find one another; a collective call.

        held_out_loss                         contrastive loss in nats, all pairs as one batch
        image_to_text_r1, image_to_text_r10   share of the images whose own caption is the nearest,
                                              or among the 10 nearest
        text_to_image_r1, text_to_image_r10   the same of the captions
        """
        image_ND, text_ND, captions_N = self.features(clip)
        both_N2D = torch.stack([image_ND, text_ND], dim=1)
        scale = clip.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp().squeeze().cpu()
        loss = contrastive_loss(both_N2D, both_N2D, captions_N, captions_N, scale)
        similarity_NN = image_ND @ text_ND.T
        return {
            "held_out_loss": loss.item() / len(captions_N),
            **_recalls("image_to_text", similarity_NN),
            **_recalls("text_to_image", similarity_NN.T),
        }


def averaged_clip(config: Config, state: TrainingState) -> LossCLIP:
    """The CLIP of the averaged weights, in fp32, on every rank's device; a collective call."""
    averaged, ranks = state.averaged_weights(), state.ranks
    with torch.random.fork_rng(devices=[]):  # its first weights are not used
        clip = LossCLIP(config).to(ranks.device)
    if averaged is not None:
        clip.load_state_dict(averaged)
    for weights in clip.state_dict().values():
        ranks.broadcast_tensor(weights)
    return clip.eval().requires_grad_(False)


def _interleaved(shares: Sequence[Tensor]) -> Tensor:
    """Rows that were dealt out to ranks one by one, in their order."""
    whole = shares[0].new_empty(sum(map(len, shares)), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


def _recalls(name: str, similarity_NN: Tensor) -> dict[str, float]:
    """R@1 and R@10 of rows whose right column is on the diagonal; ties count as found."""
    nearer_N = (similarity_NN > similarity_NN.diagonal()[:, None]).sum(dim=1)
    return {f"{name}_r{k}": (nearer_N < k).double().mean().item() for k in (1, 10)}
