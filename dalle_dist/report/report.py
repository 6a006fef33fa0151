"""The report of a finished run: one self-contained HTML page, its table as a PNG, its figures."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist.checkpoint.release import Release, load_release
from dalle_dist.config import Config
from dalle_dist.data import storage
from dalle_dist.data.labelled_grid import grid, to_image
from dalle_dist.data.loader import ImageDataset
from dalle_dist.data.token_dataset import TokenDataset
from dalle_dist.generate.generator import Generator, sample_seed
from dalle_dist.metrics.caption_gain import caption_losses
from dalle_dist.metrics.codes import code_counts, entropy, share_in_use
from dalle_dist.metrics.identification import identify, sample_images, summary
from dalle_dist.metrics.reconstruction import psnr, ssim
from dalle_dist.report.figures import Row, curves, table
from dalle_dist.report.page import page
from dalle_dist.train.run import read_log

CAPTIONS, SAMPLES, RECONSTRUCTIONS = 24, 4, 24
IDENTIFIED = 512  # captions of the identification, at most
DVAE_PANELS = (
    {"nll": "reconstruction, nats/dim"},
    {"kl": "KL, nats/dim"},
    {"psnr": "PSNR, dB"},
    {"ssim": "SSIM"},
    {"codes_in_use": "share of codes in use"},
    {"codes_perplexity": "perplexity of the codes"},
)
TRAIN_PANELS = (
    {"loss_image": "image, training", "held_out_image": "image, held out"},
    {"loss_text": "text, training", "held_out_text": "text, held out"},
    {"caption_gain": "what the caption is worth, nats per image token"},
    {"identification_r1": "identification, R@1", "identification_r10": "identification, R@10"},
    {"lr": "learning rate"},
)


@dataclass(frozen=True)
class HeldOut:
    """The held-out images, in the order of their token shards."""

    captions: list[str]
    images_BCHW: Tensor  # floats in [0, 1]
    text_BT: Tensor
    codes_BN: Tensor

    def reconstructed(self, generator: Generator) -> Tensor:
        """What the image tokenizer makes of its own codes: images_BCHW."""
        return torch.cat([generator.image_tokenizer.decode(p) for p in self.codes_BN.split(64)])


def write_report(config: Config) -> None:
    """Write report.html, report.png and figures.json into the run's folder; print the figures.

    Raises:
        CheckpointError: the run has no release yet.
        DataError: held-out shards missing, or of another image tokenizer.
    """
    release = load_release(storage.join(config.paths.run, "release"))
    generator = Generator(
        release.transformer,
        release.tokenizer,
        release.image_tokenizer,
        release.config,
        release.fingerprint,
    )
    tokens = {part: _tokens(config, part, release) for part in ("train", "held-out")}
    held_out = _held_out(config, tokens["held-out"], release.image_tokenizer.image_size)
    figures = measure(config, generator, held_out, tokens["train"])
    rows = sample_rows(generator, held_out, config.seed)
    title = f"{config.name}: {len(rows)} captions the model never saw, {SAMPLES} samples each"
    images = {
        "Captions it never saw": table(rows, title),
        "Reconstructions: originals above, through the codes below": _pairs(held_out, generator),
        "Training the transformer": curves(read_log(config.paths.run), TRAIN_PANELS),
    }
    stage1 = config.paths.dvae_run
    # Other image tokenizers come from elsewhere, and so may a dVAE.
    if config.image_tokenizer.kind == "dvae" and storage.exists(storage.join(stage1, "log.jsonl")):
        images["Training the dVAE"] = curves(read_log(stage1), DVAE_PANELS)
    _write(config, figures, images)


def measure(
    config: Config, generator: Generator, held_out: HeldOut, train: TokenDataset
) -> dict[str, Any]:
    """Held-out figures: of reconstructions, codes, what captions are worth, identification."""
    codes = torch.cat([held_out.codes_BN, torch.stack([train[i].codes for i in range(len(train))])])
    losses = caption_losses(generator.model, held_out.text_BT, held_out.codes_BN, seed=config.seed)
    counts_K = code_counts(codes, config.transformer.codebook_size)
    reconstructed_BCHW = held_out.reconstructed(generator).cpu()
    psnr_B, ssim_B = (f(held_out.images_BCHW, reconstructed_BCHW) for f in (psnr, ssim))
    return {
        "held-out images": len(held_out.captions),
        "PSNR of reconstructions, dB (mean over images)": round(psnr_B.mean().item(), 2),
        "SSIM of reconstructions (mean over images)": round(ssim_B.mean().item(), 3),
        "share of codes in use": round(share_in_use(counts_K), 3),
        "perplexity of the codes": round(math.exp(entropy(counts_K)), 1),
        "image loss, right caption, nats/token": round(losses.right, 3),
        "image loss, captions shuffled, nats/token": round(losses.shuffled, 3),
        "what the caption is worth, nats/token": round(losses.gain, 3),
        **identification(generator, held_out, config.seed),
        "model": generator.fingerprint,
    }


def identification(generator: Generator, held_out: HeldOut, seed: int) -> dict[str, float]:
    """Of the first held-out captions, one image each, by the release's sampling options."""
    captions = held_out.captions[:IDENTIFIED]
    generated_BCHW = sample_images(
        generator.model,
        generator.image_tokenizer,
        held_out.text_BT[: len(captions)],
        [sample_seed(seed, caption, 0) for caption in captions],
    )
    found = summary(identify(generated_BCHW, held_out.images_BCHW[: len(captions)]))
    return {
        "identification R@1": round(found["r1"], 3),
        "identification R@10": round(found["r10"], 3),
        "identification, median rank": found["rank"],
    }


def sample_rows(generator: Generator, held_out: HeldOut, seed: int) -> list[Row]:
    """Samples by the release's sampling options, for captions spread over the held-out set."""
    count = min(CAPTIONS, len(held_out.captions))
    chosen = [i * len(held_out.captions) // count for i in range(count)]
    captions = [held_out.captions[i] for i in chosen]
    made = generator.generate(captions, n=SAMPLES, seed=seed)
    samples = [made[k * SAMPLES : (k + 1) * SAMPLES] for k in range(count)]
    return [
        Row(caption, to_image(held_out.images_BCHW[i]), [sample.image for sample in row])
        for i, caption, row in zip(chosen, captions, samples, strict=True)
    ]


def _tokens(config: Config, part: str, release: Release) -> TokenDataset:
    return TokenDataset(
        storage.join(config.paths.tokens, part),
        None,
        release.tokenizer,
        config.transformer.text_tokens,
        release.image_tokenizer.fingerprint,
        config.transformer.image_grid,
    )


def _held_out(config: Config, tokens: TokenDataset, size: int) -> HeldOut:
    folder = storage.join(config.paths.images, "held-out")
    images = ImageDataset(folder, None, size, None, config.seed)
    # A corrupt image has no tokens, so the two are matched by key.
    by_key = {sample.key: sample for sample in map(images.read, range(len(images))) if sample}
    samples = [by_key[tokens.key(i)] for i in range(len(tokens))]
    pairs = [tokens[i] for i in range(len(tokens))]
    return HeldOut(
        [sample.caption for sample in samples],
        torch.stack([sample.image_CHW for sample in samples]).float() / 255,
        torch.stack([pair.text for pair in pairs]),
        torch.stack([pair.codes for pair in pairs]),
    )


def _pairs(held_out: HeldOut, generator: Generator) -> Image.Image:
    originals = [to_image(image) for image in held_out.images_BCHW[:RECONSTRUCTIONS]]
    images = held_out.reconstructed(generator)[:RECONSTRUCTIONS]
    half = len(originals) // 2 or 1
    rows = []
    for start in range(0, len(originals), half):
        rows.append(originals[start : start + half])
        rows.append([to_image(image) for image in images[start : start + half]])
    return grid(rows)


def _write(config: Config, figures: dict[str, Any], images: dict[str, Image.Image]) -> None:
    run = config.paths.run
    storage.write_bytes(
        storage.join(run, "figures.json"), json.dumps(figures, indent=2).encode() + b"\n"
    )
    html = page(f"dalle-dist: {config.name}", figures, images)
    storage.write_bytes(storage.join(run, "report.html"), html.encode())
    storage.write_bytes(storage.join(run, "report.png"), _png(next(iter(images.values()))))
    for name, value in figures.items():
        print(f"{name:45} {value}")
    print(storage.join(run, "report.html"))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
