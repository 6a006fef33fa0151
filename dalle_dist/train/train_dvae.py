"""Stage 1: train the discrete VAE on image shards (paper 2.1, A.2, A.3).

Shape suffixes as in `dalle_dist.dvae.model`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.release import CONFIG, save_dvae_release
from dalle_dist.config import Config
from dalle_dist.data import storage
from dalle_dist.data.augment import Augmentation
from dalle_dist.data.loader import ImageDataset, batches, collate_images
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.pictures import grid, to_image
from dalle_dist.data.shards import ShardIndex
from dalle_dist.distributed import launch
from dalle_dist.distributed.launch import Ranks
from dalle_dist.dvae.loss import elb_terms, map_pixels
from dalle_dist.dvae.metrics import psnr, reconstruct, share_in_use
from dalle_dist.dvae.model import COLOURS, DVAE
from dalle_dist.dvae.schedules import Rates, rates
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.train.opening import (
    devices,
    dvae_schedule,
    length,
    pictures,
    refuse_endless_warmup,
    table,
    unfinished,
)
from dalle_dist.train.run import Run
from dalle_dist.train.stop import StopRequest

SHOWN = 16  # pictures in a reconstruction grid
STATE = "state.pt"


def train_dvae(config: Config, resume: str | None = None) -> None:
    """Train until `dvae_train.steps`, then write the run's release folder.

    Raises:
        ConfigError: the batch cannot be split over the ranks, or a resumed shape differs.
        DataError: shards missing or damaged.
        UserError: the run folder is in use.
    """
    ranks = launch.init()
    setup = ranks.together(lambda: _Setup(config, ranks))
    run = Run(config.paths.dvae_run, config, ranks, resume=resume is not None, shape=("dvae",))
    try:
        _Trainer(config, ranks, run, setup).train(resume)
    finally:
        run.close()


class _Setup:
    """The inputs of a run, checked before anything is written."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        settings = config.dvae_train
        if settings.batch_size % ranks.world:
            raise ConfigError(
                f"dvae_train.batch_size: {settings.batch_size} is not a multiple of the "
                f"{ranks.world} ranks"
            )
        refuse_endless_warmup("dvae_train.warmup", settings.warmup, settings.steps)
        augmentation = None
        if settings.augment:
            augmentation = Augmentation(
                config.dvae.image_size, settings.crop_min, settings.crop_max, settings.flip
            )
        self.train_set = _dataset(config, "train", augmentation)
        self.held_out = _dataset(config, "held-out", None)
        if ranks.local_rank == 0:
            for dataset in (self.train_set, self.held_out):
                dataset.shards.require_files()
        # Pictures for the first biases, and the proof that there are some that can be read.
        self.first_BCHW = _stack(self.train_set, 256)


class _Trainer:
    """One rank's model, average, optimizer and data."""

    def __init__(self, config: Config, ranks: Ranks, run: Run, setup: _Setup) -> None:
        self.config, self.settings, self.ranks, self.run = config, config.dvae_train, ranks, run
        self.train_set, self.held_out = setup.train_set, setup.held_out
        self.update = 0
        self._logged = (time.perf_counter(), 0)  # when the last line was logged, and its update
        torch.manual_seed(config.seed)
        self.dvae = DVAE(config.dvae).to(ranks.device)
        # Channels last is what the convolutions of CPUs and GPUs are fastest in.
        self.dvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        start_at_data(self.dvae, setup.first_BCHW.to(ranks.device))
        self.ema = {name: value.clone() for name, value in self.dvae.state_dict().items()}
        self.model: nn.Module = self.dvae
        if ranks.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.dvae)
        self.optimizer = torch.optim.AdamW(
            self.dvae.parameters(),
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )

    def train(self, resume: str | None) -> None:
        self._restore(resume)
        opening = self._opening()
        self.run.open()
        if resume is not None:
            self.run.rewind(self.update)
        if self.update >= self.settings.steps and (self.run.folder / "release" / CONFIG).exists():
            self.run.say(f"complete at update {self.update}; nothing to do")
            return
        self.run.say(opening)
        bar = self.run.progress(self.settings.steps, self.update)
        self._logged = (time.perf_counter(), self.update)
        stop = StopRequest()
        for batch in self._batches():
            if self.update >= self.settings.steps or stop.agreed(self.ranks):
                break
            terms, now = self._step(batch)
            bar.update()
            self._after_update(terms, now, bar)
        bar.close()
        if self.update < self.settings.steps:
            self._save()
            self.run.say(f"stopped at update {self.update}; --resume auto goes on")
            return
        self._finish()

    def _batches(self) -> Iterator[Any]:
        return batches(
            self.train_set,
            batch_size=self.settings.batch_size,
            micro_batch=self.settings.batch_size // self.ranks.world,
            rank=self.ranks.rank,
            world=self.ranks.world,
            start=self.update,
            workers=self.config.data.workers,
            collate=collate_images,
        )

    def _step(self, batch: Any) -> tuple[Tensor, Rates]:
        """One update; this rank's (nll, kl), left on the device, and the rates in force."""
        now = rates(self.settings, self.update)
        images_BCHW = batch.image_BCHW.to(self.ranks.device).float() / 255
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        nll, kl = self._forward(images_BCHW, batch.positions, now)
        self.optimizer.zero_grad(set_to_none=True)
        (nll + now.kl_weight * kl).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = now.lr
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.dvae.parameters(), self.settings.clip)
        self.optimizer.step()
        self._average()
        self.update += 1
        return torch.stack([nll.detach(), kl.detach()]), now

    def _forward(self, images_BCHW: Tensor, positions: Tensor, now: Rates) -> tuple[Tensor, Tensor]:
        dvae, device = self.config.dvae, self.ranks.device
        shape = (dvae.codebook_size, dvae.grid, dvae.grid)
        noise_BKGG = gumbel_noise(shape, self.config.seed, positions.tolist(), device)
        bf16 = computes_in_bf16(self.settings.precision, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits_BKGG, stats_BSHW = self.model(images_BCHW, noise_BKGG, now.temperature)
        return elb_terms(images_BCHW, logits_BKGG, stats_BSHW)

    @torch.no_grad()
    def _average(self) -> None:
        # The ramp lets the average forget the initial weights in runs of a few hundred updates.
        decay = min(self.settings.ema, (1 + self.update) / (10 + self.update))
        torch._foreach_lerp_(
            list(self.ema.values()), list(self.dvae.state_dict().values()), 1 - decay
        )

    def _after_update(self, terms: Tensor, now: Rates, bar: Any) -> None:
        settings, last = self.settings, self.update == self.settings.steps
        if self.update % settings.log_every == 0 or last:
            numbers = self._numbers(terms, now)
            bar.set_postfix(
                nll=f"{numbers['nll']:.3f}", img_s=f"{numbers['images_per_s']:.0f}", refresh=False
            )
            self.run.log(self.update, **numbers)
        if self.update % settings.eval_every == 0 or last:
            self._evaluate()
        if self.update % settings.save_every == 0 or last:
            self._save()

    def _numbers(self, terms: Tensor, now: Rates) -> dict[str, float]:
        """What one line of the log says: terms of this update over all ranks, mean speed since."""
        nll, kl = (total / self.ranks.world for total in self.ranks.sum(terms.tolist()))
        began, counted = self._logged
        self._logged = (time.perf_counter(), self.update)
        updates_per_s = (self.update - counted) / (self._logged[0] - began)
        return {
            "nll": nll,
            "kl": kl,
            "elb": -(nll + kl),
            "temperature": now.temperature,
            "kl_weight": now.kl_weight,
            "lr": now.lr,
            "images_per_s": self.settings.batch_size * updates_per_s,
        }

    def _evaluate(self) -> None:
        """PSNR and codes in use on held-out pictures, by the averaged weights; rank 0 alone."""
        if self.ranks.rank != 0:
            return
        images_BCHW = _stack(self.held_out, 512).to(self.ranks.device)
        with self._averaged_weights():
            codes_BGG, pictures_BCHW = reconstruct(self.dvae, images_BCHW)
        self.run.log(
            self.update,
            psnr=psnr(images_BCHW, pictures_BCHW).mean().item(),
            codes_in_use=share_in_use(codes_BGG, self.config.dvae.codebook_size),
        )
        shown = [images_BCHW[:SHOWN], pictures_BCHW[:SHOWN]]
        rows = [[to_image(picture) for picture in pictures] for pictures in shown]
        self.run.image(self.update, "reconstructions", grid(rows))

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        raw = {name: value.clone() for name, value in self.dvae.state_dict().items()}
        self.dvae.load_state_dict(self.ema)
        try:
            yield
        finally:
            self.dvae.load_state_dict(raw)

    def _save(self) -> None:
        def write(folder: Path) -> None:
            if self.ranks.rank == 0:
                state = {
                    "update": self.update,
                    "model": self.dvae.state_dict(),
                    "ema": self.ema,
                    "optimizer": self.optimizer.state_dict(),
                }
                torch.save(state, folder / STATE)

        checkpoints = self.run.folder / "checkpoints"
        store.save(checkpoints, self.update, write, self.ranks, self.settings.keep)
        self.run.sync()

    def _restore(self, resume: str | None) -> None:
        if resume is None:
            return
        found = store.latest(self.run.folder / "checkpoints") if resume == "auto" else Path(resume)
        if found is None:
            return
        if resume != "auto":
            store.verify(found)
        if not (found / STATE).is_file():
            raise CheckpointError(f"{found}: no checkpoint of a dVAE ({STATE} is missing)")
        state = torch.load(found / STATE, map_location=self.ranks.device, weights_only=True)
        self.update, self.ema = state["update"], state["ema"]
        self.dvae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _finish(self) -> None:
        if self.ranks.rank == 0:
            folder = str(self.run.folder / "release")
            digest = save_dvae_release(folder, self.config, self.ema)
            self.run.say(f"complete; dVAE {digest} in release/")

    def _opening(self) -> str:
        """What the run says of itself before its first update; a collective call."""
        settings, shape = self.settings, self.config.dvae
        weights = sum(parameter.numel() for parameter in self.dvae.parameters())
        bf16 = computes_in_bf16(settings.precision, self.ranks.device)
        block = {
            "device": devices(self.ranks),
            "model": f"dVAE of {weights:,} parameters: {shape.image_size} x {shape.image_size} "
            f"pixels to {shape.grid} x {shape.grid} codes out of {shape.codebook_size:,}",
            "precision": "bf16 autocast, fp32 weights" if bf16 else "fp32",
            "data": pictures(self.config.paths.images, len(self.train_set), len(self.held_out)),
            "length": length(settings.steps, settings.batch_size, len(self.train_set)),
            "schedule": dvae_schedule(settings),
            "warning": unfinished(settings),
            "from": "the start" if not self.update else f"update {self.update:,}",
        }
        return "training the dVAE\n" + table(block)


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast; emulated bf16 is slower than fp32, so "auto" asks the hardware."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


@torch.no_grad()
def start_at_data(dvae: DVAE, images_BCHW: Tensor) -> None:
    """Set the output biases to the likelihood's optimum for a constant picture.

    The mean and spread of the colours then need not be learnt through the deep decoder, which is
    what short runs spend their first hundreds of updates on. Weights keep the paper's draw.
    """
    logits_BCHW = torch.logit(map_pixels(images_BCHW))
    median_C = logits_BCHW.transpose(0, 1).flatten(1).median(dim=1).values
    spread_C = (logits_BCHW - median_C[:, None, None]).abs().mean(dim=(0, 2, 3))
    output: Any = dvae.decoder.output
    bias = output.bias
    bias[:COLOURS] = median_C
    bias[COLOURS:] = spread_C.clamp_min(1e-2).log()


def gumbel_noise(
    shape: tuple[int, ...], seed: int, positions: list[int], device: torch.device
) -> Tensor:
    """Standard Gumbel noise, each sample's own by (seed, position): noise_B... of `shape`.

    The same whichever rank draws it, so that runs do not depend on the number of ranks.
    """
    generator = torch.Generator(device)
    uniform = torch.empty(len(positions), *shape, device=device)
    for row, position in zip(uniform, positions, strict=True):
        digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=4).digest()
        row.uniform_(generator=generator.manual_seed(int.from_bytes(digest, "big")))
    return uniform.clamp_min_(1e-20).log_().neg_().log_().neg_()


def _dataset(config: Config, part: str, augment: Augmentation | None) -> ImageDataset:
    folder = storage.join(config.paths.images, part)
    sizes = [shard.samples for shard in ShardIndex.load(folder).shards]
    order = SampleOrder(config.seed, sizes, config.data.shuffle_shards) if part == "train" else None
    return ImageDataset(folder, order, config.dvae.image_size, augment, config.seed)


def _stack(dataset: ImageDataset, most: int) -> Tensor:
    """The first pictures of a data set, floats in [0, 1]: images_BCHW."""
    count = min(most, len(dataset))
    return torch.stack([dataset[i].image_CHW for i in range(count)]).float() / 255
