"""What guidance is best: finished runs of stage 2, evaluated with several weights.

    python -m benchmarks.guidance runs/demo runs/demo-1 runs/demo-2

The runs are of one config and differ in their seeds. Each is evaluated as `dalle-dist report` does:
losses of the held-out images, and identification by one sample per held-out caption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import Measured, report
from dalle_dist.checkpoint.release import load_release
from dalle_dist.config import Config, load
from dalle_dist.generate.generator import Generator
from dalle_dist.metrics.caption_gain import caption_losses
from dalle_dist.metrics.identification import identify, summary
from dalle_dist.report.inputs import HeldOut, read_tokens
from dalle_dist.report.measures import sample_captions

WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0)
UNITS = {
    "held-out image loss": "nats/token",
    "caption gain": "nats/token",
    "identification R@1": "share",
    "identification R@10": "share",
    "identification, median rank": "rank",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="CSV file to append to, not benchmarks/results/")
    parser.set_defaults(smoke=False)
    options = parser.parse_args()
    configs = [load(f"{run}/config.yaml") for run in options.runs]
    rows: list[Measured] = []
    for weight in WEIGHTS:
        found = [figures(config, weight) for config in configs]
        rows += measured(f"guidance {weight:g}", found, UNITS)
    report("guidance", configs[0], rows, options)


def measured(
    case: str, runs: Sequence[Mapping[str, float]], units: Mapping[str, str]
) -> list[Measured]:
    return [Measured(case, name, unit, [run[name] for run in runs]) for name, unit in units.items()]


def figures(config: Config, guidance: float) -> dict[str, float]:
    """Of a finished run of stage 2, by one weight of guidance; kept beside the run."""
    release = load_release(f"{config.paths.run}/release")
    kept = Path(f"{config.paths.run}/guidance-{guidance:g}-{release.fingerprint}.json")
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    model = release.transformer
    sampling = dataclasses.replace(config.sampling, guidance=guidance)
    model.config = dataclasses.replace(release.config, sampling=sampling)
    generator = Generator(model, release.tokenizer, release.image_tokenizer, model.config)
    tokens = read_tokens(config, "held-out", release)
    held_out = HeldOut.load(config, tokens, release.image_tokenizer.image_size)
    losses = caption_losses(model, held_out.text_BT, held_out.codes_BN)
    generated_BCHW = sample_captions(generator, held_out, config.seed)
    true_BCHW = held_out.images_BCHW[: len(generated_BCHW)].float() / 255
    ranks = summary(identify(generated_BCHW, true_BCHW))
    values = losses.right, losses.gain, ranks["r1"], ranks["r10"], ranks["rank"]
    found = dict(zip(UNITS, values, strict=True))
    kept.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
