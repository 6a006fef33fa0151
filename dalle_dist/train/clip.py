"""train-clip: a CLIP on image shards and their captions (arXiv 2103.00020), to rank images by.

Shape suffixes: B pairs of a micro-batch, C channels, H and W pixels, T text positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist import storage
from dalle_dist.clip.captions import caption_ids, hashed
from dalle_dist.clip.hugging_face import library
from dalle_dist.clip.model import LossCLIP, decayed, end_of_text
from dalle_dist.config import CLIPTrainConfig, Config
from dalle_dist.data.augment import Augmentation
from dalle_dist.data.image_dataset import ImageDataset, ImageSample, collate_images
from dalle_dist.data.labelled_grid import grid
from dalle_dist.data.loader import Samples
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.engine.deepspeed.settings import deepspeed_config
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import ConfigError
from dalle_dist.optim.cosine_schedule import CosineSchedule
from dalle_dist.precision.hardware import decided
from dalle_dist.text_tokenizer.registry import load_text_tokenizer
from dalle_dist.train import banner
from dalle_dist.train.data import training_order
from dalle_dist.train.flop import clip_flop
from dalle_dist.train.held_out_clip import Encoded, HeldOutPairs, averaged_clip
from dalle_dist.train.loop import train_stage
from dalle_dist.train.stage import Stage
from dalle_dist.train.state import TrainingState

SHOWN, NEAREST = 8, 8  # captions of a sample sheet, and images of each


def train_clip(config: Config, resume: str | None = None, new_epoch: bool = False) -> None:
    """Train the CLIP; arguments and errors are those of `loop.train_stage`."""
    train_stage(CLIPStage, config, resume, new_epoch)


class CLIPStage(Stage):
    kind, title, sections = "clip", "CLIP", ("tokenizer", "clip")
    settings: CLIPTrainConfig

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, settings = config, config.clip_train
        # As in stage 1: fp32 weights, bf16 by autocast, decided before a rank can have failed.
        self._bf16 = decided(settings.precision, ranks) == "bf16"
        self.settings = dataclasses.replace(settings, precision="fp32")
        self.run_path, self.data_path = config.paths.clip_run, config.paths.images
        library()
        deepspeed_config(self.settings, ranks.world)
        self.tokenizer = _tokenizer(config)
        self.train_set = self._dataset("train", ranks)
        self.held_out = self._dataset("held-out", ranks)
        self.precision = "bf16 autocast, fp32 weights" if self._bf16 else "fp32"
        self.dtype = torch.bfloat16 if self._bf16 else torch.float32
        self.fingerprints = {"tokenizer": self.tokenizer.fingerprint}
        self._pairs: HeldOutPairs | None = None
        self.train_set[ranks.rank]  # the proof that some image can be read

    def _dataset(self, part: str, ranks: Ranks) -> ImageDataset:
        config, settings, order, augment = self.config, self.settings, None, None
        folder, size = storage.join(config.paths.images, part), config.clip.image_size
        if part == "train":
            order = training_order(folder, config, settings, ranks)
            if settings.augment:
                augment = Augmentation(size, settings.crop_min, settings.crop_max, flip=False)
        return ImageDataset(folder, order, size, augment, config.seed, config.data.bad_shards)

    @property
    def datasets(self) -> tuple[ImageDataset, ImageDataset]:
        return self.train_set, self.held_out

    def build_engine(self, ranks: Ranks) -> Engine:
        model = LossCLIP(self.config, self._bf16)
        return build_engine(
            model, self.settings, ranks, seed=self.config.seed, decayed=decayed(model)
        )

    def schedule(self) -> CosineSchedule:
        return CosineSchedule(self.settings)

    def collate(self, samples: Samples[ImageSample]) -> Encoded:
        # No BPE dropout: the paper has none, and it costs a short run much (docs/log.md).
        length, end = self.config.clip.text_tokens, end_of_text(self.config)
        batch = collate_images(samples)
        ids = [caption_ids(self.tokenizer, caption, length, end) for caption in batch.captions]
        return batch.image_BCHW, torch.tensor(ids), torch.tensor([hashed(row) for row in ids])

    def loss(
        self, engine: Engine, micro_batch: Encoded, counts: Sequence[float], step: int
    ) -> tuple[Tensor, Tensor]:
        device = next(engine.module.parameters()).device
        images_BCHW, text_BT, captions_B = (
            part.to(device, non_blocking=True) for part in micro_batch
        )
        images_BCHW = images_BCHW.contiguous().float() / 255
        loss, scale = engine(images_BCHW, text_BT, captions_B)
        loss = loss / self.settings.batch_size
        share = len(images_BCHW) / self.settings.batch_size
        return loss, torch.stack([loss, share * scale])

    def numbers(self, terms: Sequence[float], step: int) -> dict[str, float]:
        loss, scale = terms
        return {"loss": loss, "logit_scale": scale}

    @property
    def alone(self) -> bool:
        return False  # the loss is of all ranks' pairs

    def flop(self, device: torch.device) -> float:
        return clip_flop(self.config.clip)

    def validate(self, state: TrainingState) -> dict[str, float]:
        """Those of `HeldOutPairs.measure`, by the averaged weights."""
        return self._held_out_pairs(state).measure(averaged_clip(self.config, state))

    def sample(self, state: TrainingState) -> dict[str, Image.Image]:
        """The first held-out captions, each over the held-out images nearest to it."""
        clip = averaged_clip(self.config, state)
        image_ND, text_ND, _ = self._held_out_pairs(state).features(clip)
        if state.ranks.rank != 0:
            return {}
        nearest = (text_ND[:SHOWN] @ image_ND.T).topk(min(NEAREST, len(image_ND))).indices.tolist()
        rows = [[self.held_out[i].image for i in row] for row in nearest]
        captions = [[self.held_out[i].caption] for i in range(len(rows))]
        return {"nearest": grid(rows, captions=captions)}

    def _held_out_pairs(self, state: TrainingState) -> HeldOutPairs:
        if self._pairs is None:
            self._pairs = HeldOutPairs(self.held_out, self.collate, state.ranks)
        return self._pairs

    def banner(self, ranks: Ranks, parameters: int) -> dict[str, str]:
        shape = self.config.clip
        return {
            "model": f"CLIP of {parameters:,} parameters: {shape.image_size} x {shape.image_size} "
            f"pixels in patches of {shape.patch_size}, {shape.text_tokens} text tokens, "
            f"{shape.features} features",
            "precision": self.precision,
            "sharding": f"ZeRO-{self.settings.zero_stage}",
            "schedule": banner.clip_schedule(self.settings),
        }


def _tokenizer(config: Config) -> Any:
    """The run's text tokenizer. Raises ConfigError: no BPE, or of more classes than the config."""
    if config.tokenizer.kind != "bpe":
        raise ConfigError(
            f"tokenizer.kind: train-clip writes files of Hugging Face's tokenizers, which it can "
            f"of bpe alone, not of '{config.tokenizer.kind}'"
        )
    tokenizer = load_text_tokenizer(config.tokenizer.kind, config.paths.tokenizer)
    if tokenizer.vocab_size > config.tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: {config.tokenizer.vocab_size}, but {config.paths.tokenizer} "
            f"has {tokenizer.vocab_size}; train it again, or raise the setting"
        )
    return tokenizer
