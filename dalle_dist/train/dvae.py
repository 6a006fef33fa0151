"""Stage 1: the discrete VAE on image shards (paper 2.1, A.2, A.3).

Shape suffixes as in `dalle_dist.dvae.model`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist import storage
from dalle_dist.config import Config, DVAETrainConfig, StageConfig
from dalle_dist.data.augment import Augmentation
from dalle_dist.data.image_dataset import ImageBatch, ImageDataset, ImageSample, collate_images
from dalle_dist.data.labelled_grid import grid, to_image
from dalle_dist.data.loader import Samples
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.dvae.loss_model import LossDVAE, gumbel_noise, start_at_data
from dalle_dist.dvae.model import decayed
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.engine.deepspeed.settings import deepspeed_config
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import DataError
from dalle_dist.metrics.reconstruction import reconstruct
from dalle_dist.optim.dvae_schedule import DVAESchedule
from dalle_dist.precision.hardware import decided
from dalle_dist.train.banner import dvae_schedule, unfinished
from dalle_dist.train.data import training_order
from dalle_dist.train.flop import dvae_flop
from dalle_dist.train.held_out_images import HeldOutImages, averaged_dvae, collapse
from dalle_dist.train.loop import train_stage
from dalle_dist.train.stage import Stage
from dalle_dist.train.state import TrainingState

SHOWN = 16  # images in a reconstruction grid


def train_dvae(config: Config, resume: str | None = None, new_epoch: bool = False) -> None:
    """Train the dVAE; arguments and errors are those of `loop.train_stage`."""
    train_stage(DVAEStage, config, resume, new_epoch)


class DVAEStage(Stage):
    kind, title, sections = "dvae", "dVAE", ("dvae",)
    settings: DVAETrainConfig

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, settings = config, config.dvae_train
        # The weights stay fp32; what computes in bf16 is under autocast, inside the model.
        # Decided first of all, since no rank may miss the call.
        self._bf16 = decided(settings.precision, ranks) == "bf16"
        self.settings = dataclasses.replace(settings, precision="fp32")
        self.run_path, self.data_path = config.paths.dvae_run, config.paths.images
        deepspeed_config(self.settings, ranks.world)
        augmentation = None
        if settings.augment:
            augmentation = Augmentation(
                config.dvae.image_size, settings.crop_min, settings.crop_max, settings.flip
            )
        self.train_set = self._dataset("train", augmentation, ranks)
        self.held_out = self._dataset("held-out", None, ranks)
        self.precision = "bf16 autocast, fp32 weights" if self._bf16 else "fp32"
        self.dtype = torch.bfloat16 if self._bf16 else torch.float32
        self.fingerprints = {}
        self._measured: HeldOutImages | None = None
        # Images for the first biases, and the proof that there are some that can be read.
        self._first_BCHW = _first(self.train_set, 256)

    def _dataset(self, part: str, augment: Augmentation | None, ranks: Ranks) -> ImageDataset:
        config, order = self.config, None
        folder = storage.join(config.paths.images, part)
        if part == "train":
            order = training_order(folder, config, self.settings, ranks)
        size, bad = config.dvae.image_size, config.data.bad_shards
        return ImageDataset(folder, order, size, augment, config.seed, bad)

    @property
    def datasets(self) -> tuple[ImageDataset, ImageDataset]:
        return self.train_set, self.held_out

    def build_engine(self, ranks: Ranks) -> Engine:
        model = LossDVAE(self.config.dvae, self._bf16, self.settings.nll_beta)
        start_at_data(model, self._first_BCHW)
        return dvae_engine(model, self.settings, ranks, self.config.seed)

    def schedule(self) -> DVAESchedule:
        return DVAESchedule(self.config.dvae_train)

    def collate(self, samples: Samples[ImageSample]) -> ImageBatch:
        return collate_images(samples)

    def loss(
        self, engine: Engine, micro_batch: ImageBatch, counts: Sequence[float], step: int
    ) -> tuple[Tensor, Tensor]:
        now, dvae = self.schedule().at(step), self.config.dvae
        device = next(engine.module.parameters()).device
        images_BCHW = micro_batch.image_BCHW.to(device, non_blocking=True).float() / 255
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        shape = (dvae.codebook_size, dvae.grid, dvae.grid)
        seeds = micro_batch.positions.tolist()
        noise_BKGG = gumbel_noise(shape, self.config.seed, seeds, device)
        terms = engine(images_BCHW, noise_BKGG, now.temperature)
        terms = terms * (len(images_BCHW) / self.settings.batch_size)
        nll, kl = terms
        return nll + now.kl_weight * kl, terms

    def numbers(self, terms: Sequence[float], step: int) -> dict[str, float]:
        (nll, kl), now = terms, self.schedule().at(step)
        return {
            "loss": nll + now.kl_weight * kl,
            "nll": nll,
            "kl": kl,
            "elb": -(nll + kl),
            "temperature": now.temperature,
            "kl_weight": now.kl_weight,
        }

    def flop(self, device: torch.device) -> float:
        return dvae_flop(self.config.dvae, device)

    def validate(self, state: TrainingState) -> dict[str, float]:
        """Those of `HeldOutImages.measure`, by the averaged weights."""
        if self._measured is None:
            self._measured = HeldOutImages(self.held_out, state.ranks)
        return self._measured.measure(averaged_dvae(self.config.dvae, state))

    def alarm(
        self, step: int, measures: Mapping[str, float], log: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, float], str]:
        return collapse(step, measures, log)

    def sample(self, state: TrainingState) -> dict[str, Image.Image]:
        dvae = averaged_dvae(self.config.dvae, state)
        if state.ranks.rank != 0:
            return {}
        images_BCHW = _first(self.held_out, SHOWN).to(state.ranks.device)
        shown = images_BCHW, reconstruct(dvae, images_BCHW)[1]
        return {"reconstructions": grid([[to_image(image) for image in row] for row in shown])}

    def banner(self, ranks: Ranks, parameters: int) -> dict[str, str]:
        shape = self.config.dvae
        return {
            "model": f"dVAE of {parameters:,} parameters: {shape.image_size} x {shape.image_size} "
            f"pixels to {shape.grid} x {shape.grid} codes out of {shape.codebook_size:,}",
            "precision": self.precision,
            "sharding": f"ZeRO-{self.settings.zero_stage}",
            "schedule": dvae_schedule(self.config.dvae_train),
            "warning": unfinished(self.config.dvae_train),
        }


def dvae_engine(model: LossDVAE, settings: StageConfig, ranks: Ranks, seed: int = 0) -> Engine:
    """Put the dVAE under DeepSpeed; arguments and errors are those of `build_engine`."""
    engine = build_engine(model, settings, ranks, seed=seed, decayed=decayed(model))
    if engine.zero_stage == 0:
        # Convolutions else reorder their weights at each use. Not before: DeepSpeed's first
        # broadcast takes contiguous ones. ZeRO keeps weights flat, in shards.
        engine.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return engine


def _first(dataset: ImageDataset, most: int) -> Tensor:
    """The first readable images of a data set as its shards have them, in [0, 1]: images_BCHW.

    Raises DataError when there is none.
    """
    images = (dataset.read(i) for i in range(len(dataset)))
    found = [image.image_CHW for image in itertools.islice(filter(None, images), most)]
    if not found:
        raise DataError(f"{dataset.shards.folder}: none of {len(dataset)} images can be decoded")
    return torch.stack(found).float() / 255
