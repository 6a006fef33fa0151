"""Stage 2: train the transformer on text and image tokens, under DeepSpeed (paper 2.2, B.2).

Shape suffixes: B batch, T text positions, N image tokens.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from dalle_dist.checkpoint.convert import convert, find_checkpoint
from dalle_dist.checkpoint.release import DVAERelease, load_dvae
from dalle_dist.config import Config, difference, to_dict
from dalle_dist.data import storage
from dalle_dist.data.loader import TokenDataset, batches, collate_tokens
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardIndex
from dalle_dist.distributed import launch
from dalle_dist.distributed.build import build_engine
from dalle_dist.distributed.ds_config import deepspeed_config
from dalle_dist.distributed.launch import Ranks
from dalle_dist.errors import ConfigError, UserError
from dalle_dist.tokenizer import Tokenizer
from dalle_dist.train.held_out import LossTransformer, held_out_losses, sample_grid
from dalle_dist.train.opening import (
    captions,
    devices,
    length,
    pictures,
    refuse_endless_warmup,
    schedule,
    table,
)
from dalle_dist.train.run import Run
from dalle_dist.train.state import SHAPE, State, find
from dalle_dist.train.stop import StopRequest
from dalle_dist.transformer.layout import counted_text_targets
from dalle_dist.transformer.model import Transformer


def train(config: Config, resume: str | None = None) -> None:
    """Train until `train.steps`, then write the run's release folder from the averaged weights.

    Args:
        config: the run's config, the same on all ranks.
        resume: "auto" goes on from the run's newest whole checkpoint, or starts if there is none;
            a path from that checkpoint; None starts a new run.

    Raises:
        ConfigError: sizes that do not fit the ranks, the dVAE, or the run that is resumed.
        DataError: shards missing, damaged, or of another dVAE.
        CheckpointError: nothing whole to go on from, or not writable.
        UserError: the run folder is in use, or the loss is no longer a number.
    """
    ranks = launch.init()
    setup = ranks.together(lambda: _Setup(config, ranks, resume))
    run = Run(config.paths.run, config, ranks, resume=resume is not None, shape=SHAPE)
    try:
        _Trainer(config, ranks, run, setup).train(resume)
    finally:
        run.close()


class _Setup:
    """The inputs of a run, checked before anything is written."""

    def __init__(self, config: Config, ranks: Ranks, resume: str | None = None) -> None:
        deepspeed_config(config.train, ranks.world)
        refuse_endless_warmup("train.warmup", config.train.warmup, config.train.steps)
        if resume is not None and resume != "auto":
            find_checkpoint(resume)
        self.tokenizer = Tokenizer.load(config.paths.tokenizer)
        device = ranks.device if ranks.rank == 0 else "cpu"  # only rank 0 draws
        self.dvae = load_dvae(storage.join(config.paths.dvae_run, "release"), device)
        _refuse_other_dvae(config, self.dvae)
        classes = self.tokenizer.vocab_size
        # Fewer is well: a small corpus may have fewer pairs to merge than the model has classes.
        if classes > config.tokenizer.vocab_size:
            raise ConfigError(
                f"tokenizer.vocab_size: {config.tokenizer.vocab_size}, but "
                f"{config.paths.tokenizer} has {classes}; train it again, or raise the setting"
            )
        self.train_set = self._dataset(config, "train", config.tokenizer.dropout)
        self.held_out = self._dataset(config, "held-out", 0.0)
        if ranks.local_rank == 0:
            for dataset in (self.train_set, self.held_out):
                dataset.shards.require_files()
        self.fingerprints = {
            "tokenizer": self.tokenizer.fingerprint,
            "dvae": self.dvae.fingerprint,
        }

    def _dataset(self, config: Config, part: str, dropout: float) -> TokenDataset:
        folder = storage.join(config.paths.tokens, part)
        order = None
        if part == "train":
            sizes = [shard.samples for shard in ShardIndex.load(folder).shards]
            order = SampleOrder(config.seed, sizes, config.data.shuffle_shards)
        return TokenDataset(
            folder,
            order,
            self.tokenizer,
            config.transformer.text_tokens,
            dropout,
            config.seed,
            self.dvae.fingerprint,
            config.transformer.image_grid,
        )


class _Trainer:
    """One rank's part of a run."""

    def __init__(self, config: Config, ranks: Ranks, run: Run, setup: _Setup) -> None:
        self.config, self.settings, self.ranks, self.run = config, config.train, ranks, run
        self.setup = setup
        torch.manual_seed(config.seed)
        self.engine = build_engine(LossTransformer(config), config, ranks)
        self.state = State(config, ranks, self.engine, setup.fingerprints)

    def train(self, resume: str | None) -> None:
        self._restore(resume)
        opening = self._opening()
        self.run.open()
        if resume is not None:
            self.run.rewind(self.state.update)
        if self.state.update >= self.settings.steps:
            self._finish()
            return
        self.run.say(opening)
        stop, bar = StopRequest(), self.run.progress(self.settings.steps, self.state.update)
        stream, self._since = self._stream(), (time.perf_counter(), self.state.update)
        saved = -1
        while self.state.update < self.settings.steps and not stop.agreed(self.ranks):
            numbers = self._step([next(stream) for _ in range(self.engine.accumulation)])
            bar.update()
            saved = self._after_update(numbers, bar, saved)
        bar.close()
        if saved != self.state.update:
            self._save()
        if self.state.update < self.settings.steps:
            self.run.say(f"stopped at update {self.state.update}; --resume auto goes on")
        else:
            self._finish()

    def _stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(
            self.setup.train_set,
            batch_size=self.settings.batch_size,
            micro_batch=self.settings.micro_batch,
            rank=self.ranks.rank,
            world=self.ranks.world,
            start=self.state.update,
            workers=self.config.data.workers,
            collate=collate_tokens,
        )

    def _step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One update. The loss is exact: means over all tokens of the global batch.

        Captions differ in length, so each micro-batch is weighted by its share of all the text
        targets, which the ranks count before the first forward pass.
        """
        counted = sum(int(counted_text_targets(text).sum()) for text, _ in micro_batches)
        texts = self.ranks.sum([float(counted)])[0]
        images = self.settings.batch_size * self.config.transformer.image_tokens
        share, device = self.settings.text_loss, self.ranks.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for text_BT, codes_BN in micro_batches:
            text, _, image, _ = self.engine(text_BT.to(device), codes_BN.to(device))
            text, image = text / texts, image / images
            self.engine.backward(share * text + (1 - share) * image)
            sums += torch.stack([text, image]).detach()
        lr = self.state.schedule.rate(self.state.update + 1)
        number, settings = self.state.update + 1, self.settings
        logged = number % settings.log_every == 0 or number == settings.steps
        norm = self.engine.step(lr, measure=logged)
        text_loss, image_loss = self.ranks.sum(sums.tolist())
        total = share * text_loss + (1 - share) * image_loss
        self._finished(total, norm)
        return {
            "loss": total,
            "loss_text": text_loss,
            "loss_image": image_loss,
            "lr": lr,
            "grad_norm": norm,
        }

    def _finished(self, total: float, norm: float) -> None:
        self.state.update += 1
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise UserError(
                f"{self.run.path}: loss {total:g}, gradient norm {norm:g} at update "
                f"{self.state.update}; resume from the last checkpoint with a lower train.lr"
            )
        self.state.schedule.observe(self.state.update, total)
        if self.state.update % self.settings.ema_every == 0:
            self.state.ema.update(self.engine.fragments())

    def _after_update(self, numbers: dict[str, float], bar: Any, saved: int) -> int:
        """Log, evaluate, draw and save when it is time; returns the update saved last."""
        settings, update = self.settings, self.state.update
        last = update == settings.steps
        if update % settings.log_every == 0 or last:
            self.run.log(update, **numbers, **self._speed(), **self.engine.path.numbers())
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
        if update % settings.eval_every == 0 or last:
            losses = held_out_losses(
                self.engine, self.setup.held_out, settings.micro_batch, self.ranks
            )
            self.run.log(update, **losses)
        if settings.prompts and (update % settings.sample_every == 0 or last):
            self._draw()
        if update % settings.save_every == 0 or last:
            self._save()
            return update
        return saved

    def _speed(self) -> dict[str, float]:
        (began, first), now = self._since, time.perf_counter()
        self._since = (now, self.state.update)
        seconds = (now - began) / (self.state.update - first)
        tokens = self.settings.batch_size * self.config.transformer.tokens
        return {"seconds_per_update": seconds, "tokens_per_s": tokens / seconds}

    def _draw(self) -> None:
        with self.engine.sampling_model(lambda: Transformer(self.config)) as model:
            if model is not None:
                picture = sample_grid(
                    cast(Transformer, model),
                    self.setup.dvae.dvae,
                    self.setup.tokenizer,
                    self.config,
                    self.ranks.device,
                )
                self.run.image(self.state.update, "samples", picture)

    def _save(self) -> None:
        self.state.save(self.run.folder / "checkpoints")
        self.run.sync()

    def _restore(self, resume: str | None) -> None:
        if resume is None:
            return
        found = find(resume, self.run.folder / "checkpoints", self.ranks)
        if found is not None:
            self.state.load(found)

    def _finish(self) -> None:
        """The release folder, from the newest checkpoint; made anew when it has become old."""
        made = self.ranks.on_main(self._release)
        self.run.say(f"complete at update {self.state.update}; {made}")

    def _release(self) -> str:
        folder = self.run.folder / "release"
        stamp = folder / ".update"
        if stamp.is_file() and stamp.read_text() == str(self.state.update):
            return "nothing to do"
        shutil.rmtree(folder, ignore_errors=True)
        digest = convert(str(self.run.folder / "checkpoints"), str(folder), "ema")
        stamp.write_text(str(self.state.update))
        return f"transformer {digest} in release/"

    def _opening(self) -> str:
        """What the run says of itself before its first update; a collective call."""
        settings, shape, data = self.settings, self.config.transformer, self.setup.train_set
        weights = sum(math.prod(dimensions) for dimensions in self.engine.shapes.values())
        block = {
            "device": devices(self.ranks),
            "model": f"transformer of {weights:,} parameters: {shape.layers} layers of width "
            f"{shape.width}, {shape.text_tokens} text + {shape.image_tokens:,} image tokens",
            "precision": f"{settings.precision}, moments {settings.moments}",
            "sharding": f"ZeRO-{self.engine.stage}, between machines "
            f"{self.config.parallel.between_nodes}",
            "data": pictures(self.config.paths.tokens, len(data), len(self.setup.held_out)),
            "batch": f"{settings.batch_size:,} = {settings.micro_batch} x {self.ranks.world:,} "
            f"ranks x {self.engine.accumulation} accumulated",
            "length": length(settings.steps, settings.batch_size, len(data)),
            "schedule": schedule(settings),
            "captions": captions(data) if self.run.main else "",
            "from": "the start" if not self.state.update else f"update {self.state.update:,}",
        }
        return "training the transformer\n" + table(block)


def _refuse_other_dvae(config: Config, release: DVAERelease) -> None:
    lines = difference(to_dict(release.config)["dvae"], to_dict(config)["dvae"], "dvae.")
    if lines:
        raise ConfigError(f"{config.paths.dvae_run}: its dVAE is another: {'; '.join(lines)}")
