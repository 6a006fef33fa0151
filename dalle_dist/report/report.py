"""The report of a finished run: one self-contained HTML page, its table as a PNG, its figures."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from PIL import Image

from dalle_dist import storage
from dalle_dist.checkpoint.release import load_release
from dalle_dist.config import Config
from dalle_dist.data.labelled_grid import grid, to_image
from dalle_dist.generate.generator import Generator
from dalle_dist.metrics.identification import nearest
from dalle_dist.report import facts
from dalle_dist.report.completions import completions
from dalle_dist.report.figures import Row, curves, table
from dalle_dist.report.inputs import HeldOut, TrainingImages, read_tokens
from dalle_dist.report.measures import (
    CODES_IN_USE,
    caption_figures,
    identification_figures,
    reconstruction_figures,
    sample_captions,
    to_bytes,
)
from dalle_dist.report.page import Section, page
from dalle_dist.report.samples import chosen_captions, first_samples, generate_samples, rows_of
from dalle_dist.train.run import read_log

RECONSTRUCTIONS = 24
NOTE = "nearest in training: the training image nearest to the first generated one, pixel by pixel"
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
    {"completion_r1": "completion, R@1", "completion_r10": "completion, R@10"},
    {"lr": "learning rate"},
)
STAGE_1, STAGE_2 = "training, stage 1", "training, stage 2"


def write_report(config: Config) -> None:
    """Write report.html, report.png and figures.json into the run's folder; print the figures.

    Raises:
        CheckpointError: the run has no release yet.
        DataError: image or token shards missing, of another image tokenizer, or without captions.
    """
    release = load_release(storage.join(config.paths.run, "release"))
    generator = Generator(
        release.transformer,
        release.tokenizer,
        release.image_tokenizer,
        release.config,
        release.fingerprint,
    )
    tokens = {part: read_tokens(config, part, release) for part in ("train", "held-out")}
    size = release.image_tokenizer.image_size
    held_out = HeldOut.load(config, tokens["held-out"], size)
    train = TrainingImages(config, size)
    figures = reconstruction_figures(generator, held_out, tokens["train"])
    figures |= caption_figures(generator, held_out, config.seed)
    rows, found = sample(config, generator, held_out, train)
    figures |= found | {"model": generator.fingerprint}
    completed: list[Section] = []
    if "completion" in config.train.metrics:
        section, found = completions(generator, held_out, config.seed)
        completed, figures = [section], figures | found
    logs = _logs(config)
    about = facts.run_facts(config, generator, len(held_out.captions), len(tokens["train"]), logs)
    rules = facts.table_facts(len(rows), len(held_out.captions), train)
    warnings = facts.warnings(figures[CODES_IN_USE], logs.get(STAGE_1, []))
    first = table(rows, f"{facts.title(config)}: captions the model never saw", NOTE)
    sections = [
        Section("Captions it never saw", list(rules.items()), first),
        *completed,
        Section("The run", list(about.items())),
        Section("Measured on held-out images", list(figures.items())),
        Section(
            "Reconstructions: originals above, through the codes below",
            image=_pairs(held_out, generator),
        ),
        *_curves(logs),
        Section(
            "Captions of the nearest training images",
            [(row.caption, row.nearest_caption) for row in rows],
        ),
    ]
    _write(config, figures, warnings, sections, first)


def sample(
    config: Config, generator: Generator, held_out: HeldOut, train: TrainingImages
) -> tuple[list[Row], dict[str, Any]]:
    """The table's rows, and the figures of the samples for the first held-out captions."""
    chosen = chosen_captions(held_out.captions)
    samples = generate_samples(generator, [held_out.captions[i] for i in chosen], config.seed)
    generated_BCHW = sample_captions(generator, held_out, config.seed)
    # Together, as each reads the training images once.
    index_B, distance_B = nearest(
        torch.cat([first_samples(samples), to_bytes(generated_BCHW)]), train
    )
    rows = rows_of(held_out, chosen, samples, train, index_B[: len(chosen)].tolist())
    nearest_B = distance_B[len(chosen) :]
    figures = identification_figures(generated_BCHW, held_out, nearest_B, train.words)
    return rows, figures


def _logs(config: Config) -> dict[str, facts.Log]:
    """Lines of both stages, of stage 1 where it is a dVAE that was trained here."""
    logs: dict[str, facts.Log] = {}
    stage_1 = config.paths.dvae_run
    # Other image tokenizers come from elsewhere, and so may a dVAE.
    if config.image_tokenizer.kind == "dvae" and storage.exists(storage.join(stage_1, "log.jsonl")):
        logs[STAGE_1] = read_log(stage_1)
    return logs | {STAGE_2: read_log(config.paths.run)}


def _curves(logs: dict[str, facts.Log]) -> list[Section]:
    panels = {STAGE_2: TRAIN_PANELS, STAGE_1: DVAE_PANELS}
    headings = {STAGE_2: "Training the transformer", STAGE_1: "Training the dVAE"}
    return [
        Section(headings[stage], image=curves(logs[stage], shown))
        for stage, shown in panels.items()
        if stage in logs
    ]


def _pairs(held_out: HeldOut, generator: Generator) -> Image.Image:
    originals = [to_image(image / 255) for image in held_out.images_BCHW[:RECONSTRUCTIONS]]
    images = held_out.reconstructed(generator.image_tokenizer)[:RECONSTRUCTIONS]
    half = len(originals) // 2 or 1
    rows = []
    for start in range(0, len(originals), half):
        rows.append(originals[start : start + half])
        rows.append([to_image(image) for image in images[start : start + half]])
    return grid(rows)


def _write(
    config: Config,
    figures: dict[str, Any],
    warnings: list[str],
    sections: list[Section],
    first: Image.Image,
) -> None:
    run = config.paths.run
    storage.write_bytes(
        storage.join(run, "figures.json"), json.dumps(figures, indent=2).encode() + b"\n"
    )
    html = page(facts.title(config), warnings, sections)
    storage.write_bytes(storage.join(run, "report.html"), html.encode())
    storage.write_bytes(storage.join(run, "report.png"), _png(first))
    for name, value in figures.items():
        print(f"{name:65} {value}")
    for line in warnings:
        print(f"WARNING: {line}")
    print(storage.join(run, "report.html"))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
