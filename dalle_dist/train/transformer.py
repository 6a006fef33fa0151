"""Stage 2: the transformer on text and image tokens (paper 2.2, B.2).

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist import storage
from dalle_dist.config import Config, TrainConfig
from dalle_dist.data.loader import Samples
from dalle_dist.data.token_dataset import TokenDataset, TokenNoise, TokenSample, collate_tokens
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.build import build_engine
from dalle_dist.engine.deepspeed.settings import deepspeed_config, micro_batch
from dalle_dist.engine.interface import Engine
from dalle_dist.errors import ConfigError
from dalle_dist.generate.grid import sample_grid
from dalle_dist.image_tokenizer.registry import load_configured
from dalle_dist.metrics.registry import Evaluation, check, measure
from dalle_dist.optim.plateau_schedule import PlateauSchedule
from dalle_dist.precision.hardware import decided
from dalle_dist.text_tokenizer.registry import load_text_tokenizer
from dalle_dist.train import banner
from dalle_dist.train.captions import Captions
from dalle_dist.train.data import training_order
from dalle_dist.train.flop import transformer_flop
from dalle_dist.train.loop import train_stage
from dalle_dist.train.planned import Planned
from dalle_dist.train.stage import Stage
from dalle_dist.train.state import TrainingState
from dalle_dist.transformer.layout import counted_indices
from dalle_dist.transformer.loss import weighted
from dalle_dist.transformer.loss_model import unmade_transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: Config, resume: str | None = None, new_epoch: bool = False) -> None:
    """Train the transformer; arguments and errors are those of `loop.train_stage`."""
    train_stage(TransformerStage, config, resume, new_epoch)


class TransformerStage(Stage):
    kind, title = "transformer", "transformer"
    sections = ("tokenizer", "dvae", "transformer")
    settings: TrainConfig

    def __init__(self, config: Config, ranks: Ranks) -> None:
        precision = decided(config.train.precision, ranks)  # first: no rank may miss the call
        self.config, self.precision = config, precision
        self.settings = dataclasses.replace(config.train, precision=precision)
        self.dtype, self.tokens = DTYPES[self.precision], config.transformer.tokens
        self.between_nodes = config.parallel.between_nodes
        self.run_path, self.data_path = config.paths.run, config.paths.tokens
        deepspeed_config(self.settings, ranks.world)
        check(config.train.metrics)
        self.tokenizer = load_text_tokenizer(config.tokenizer.kind, config.paths.tokenizer)
        # Fewer is fine: a small corpus may have fewer pairs to merge than the model has classes.
        if self.tokenizer.vocab_size > config.tokenizer.vocab_size:
            raise ConfigError(
                f"tokenizer.vocab_size: {config.tokenizer.vocab_size}, but "
                f"{config.paths.tokenizer} has {self.tokenizer.vocab_size}; train it again, or "
                "raise the setting"
            )
        device = ranks.device if ranks.rank == 0 else "cpu"  # only rank 0 samples
        self.image_tokenizer = load_configured(config, device)
        self.train_set = self._dataset("train", ranks)
        self.held_out = self._dataset("held-out", ranks)
        self.fingerprints = {
            "tokenizer": self.tokenizer.fingerprint,
            "image tokenizer": self.image_tokenizer.fingerprint,
        }

    def _dataset(self, part: str, ranks: Ranks) -> TokenDataset:
        config, order, noise = self.config, None, None
        folder = storage.join(config.paths.tokens, part)
        if part == "train":
            order = training_order(folder, config, self.settings, ranks)
            noise = TokenNoise(
                config.tokenizer.bpe_dropout, config.train.caption_dropout, config.train.image_noise
            )
        return TokenDataset(
            folder,
            order,
            self.tokenizer,
            config.transformer.text_tokens,
            self.image_tokenizer.fingerprint,
            config.transformer.image_grid,
            seed=config.seed,
            noise=noise,
            bad_shards=config.data.bad_shards,
        )

    @property
    def datasets(self) -> tuple[TokenDataset, TokenDataset]:
        return self.train_set, self.held_out

    def build_engine(self, ranks: Ranks) -> Engine:
        config = self.config
        return build_engine(
            unmade_transformer(config),
            self.settings,
            ranks,
            parallel=config.parallel,
            seed=config.seed,
        )

    def schedule(self) -> PlateauSchedule:
        return PlateauSchedule(self.config.train)

    def collate(self, samples: Samples[Any]) -> TokenSample:
        return collate_tokens(samples)

    def counts(self, micro_batches: Sequence[TokenSample]) -> list[float]:
        """Text targets: captions differ in length, so ranks and micro-batches differ in weight."""
        return [float(sum(len(counted_indices(batch.text)) for batch in micro_batches))]

    def loss(
        self, engine: Engine, micro_batch: TokenSample, counts: Sequence[float], step: int
    ) -> tuple[Tensor, Tensor]:
        device = next(engine.module.parameters()).device
        inputs = (*micro_batch, counted_indices(micro_batch.text))
        text, _, image, *_ = engine(*(part.to(device, non_blocking=True) for part in inputs))
        images = self.settings.batch_size * self.config.transformer.image_tokens
        # No text target is left where all captions of a step were dropped.
        text, image = text / max(counts[0], 1), image / images
        return weighted(text, image, self.config.train.text_loss), torch.stack([text, image])

    def numbers(self, terms: Sequence[float], step: int) -> dict[str, float]:
        text, image = terms
        total = weighted(text, image, self.config.train.text_loss)
        return {"loss": total, "loss_text": text, "loss_image": image}

    def flop(self, device: torch.device) -> float:
        return transformer_flop(self.config)

    def validate(self, state: TrainingState) -> dict[str, float]:
        return measure(self.config.train.metrics, self._evaluation(state))

    def sample(self, state: TrainingState) -> dict[str, Image.Image]:
        if not self.config.train.prompts:
            return {}
        with self._evaluation(state).sampling_model() as model:
            if model is None:
                return {}
            image = sample_grid(
                model,
                self.image_tokenizer,
                self.tokenizer,
                self.config,
                state.ranks.device,
            )
            return {"samples": image}

    def _evaluation(self, state: TrainingState) -> Evaluation:
        size = micro_batch(self.settings, state.ranks.world)
        return Evaluation(
            state.engine, self.held_out, size, state.ranks, self.config, self.image_tokenizer
        )

    def banner(self, ranks: Ranks, parameters: int) -> dict[str, str]:
        settings, shape = self.settings, self.config.transformer
        return {
            "model": f"transformer of {parameters:,} parameters: {shape.layers} layers of width "
            f"{shape.width}, {shape.text_tokens} text + {shape.image_tokens:,} image tokens",
            "precision": f"{settings.precision}, moments {settings.moments}",
            "sharding": f"ZeRO-{settings.zero_stage}, between nodes "
            f"{self.config.parallel.between_nodes}",
            "schedule": banner.schedule(settings),
            "captions": str(self._captions) if ranks.rank == 0 else "",
        }

    def planned(self, ranks: Ranks) -> Planned:
        return Planned.of(self.config, ranks)

    def data_measures(self, ranks: Ranks) -> dict[str, float]:
        return self._captions.measures if ranks.rank == 0 else {}

    @property
    def texts(self) -> dict[str, str]:
        prompts = self.config.train.prompts
        return {"prompts": "\n".join(f"- {prompt}" for prompt in prompts)} if prompts else {}

    @functools.cached_property
    def _captions(self) -> Captions:
        return Captions.of(self.train_set)
