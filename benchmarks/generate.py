"""Generating image tokens: candidates of one caption, and windows of guesses.

    python -m benchmarks.generate --releases runs/demo/release

Candidates are timed on the training benchmark's model, whose weights do not matter. How many
guesses are right is a matter of what a model has learnt, so windows are timed on releases. Before
anything is timed, all ways must give the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Measured
from dalle_dist.config import Config
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.sampler import Draw, sample_codes
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.generate.windowed import sample_windows

CANDIDATES = 16
WINDOWS = (4, 8, 16, 32)
BATCHES = (1, 8, 64)
PROMPTS = ("red heart", "cat face", "woman astronaut", "flag japan", "clock", "tree", "dog", "car")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--releases", nargs="*", type=Path, default=[], help="trained models")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--windows", nargs="*", type=int, default=WINDOWS)
    parser.add_argument("--device", default="cpu", help="of the releases (%(default)s)")
    options = common.arguments(__doc__, rounds=3, parents=[parser])
    config = common.benchmark_config(options.smoke)
    if options.device == "cpu":
        common.report("generate", config, candidates(config, options.rounds), options)
    for path in options.releases:
        generator = Generator.load(path, device=options.device)
        for batch in options.batches:
            rows = windows(generator, batch, options.windows, options.rounds)
            common.report("generate", generator.config, rows, options, options.device)


def candidates(config: Config, rounds: int) -> list[Measured]:
    """CANDIDATES images of one caption in one batch, against one image."""
    model = common.benchmark_model(config).eval()
    text_BT = common.random_batch(config, batch=1)[0].expand(CANDIDATES, -1)
    seeds, sampling = list(range(CANDIDATES)), Sampling()
    together = sample_codes(model, text_BT, seeds, sampling)
    _check(together[:1], sample_codes(model, text_BT[:1], seeds[:1], sampling))
    cases = {
        "one": partial(sample_codes, model, text_BT[:1], seeds[:1], sampling),
        "many": partial(sample_codes, model, text_BT, seeds, sampling),
    }
    times, peak = common.interleaved(cases, rounds), common.peak_memory(cases["many"])
    name = f"{CANDIDATES} candidates"
    ratios = [many / one for many, one in zip(times["many"], times["one"], strict=True)]
    return [
        Measured("one candidate", "one caption", "s", times["one"]),
        Measured(name, "one caption", "s", times["many"]),
        Measured(f"{name} / one", "time", "x", ratios),
        Measured(name, "peak memory beyond the model's", "MiB", [peak]),
    ]


@torch.no_grad()
def windows(generator: Generator, batch: int, chosen: Sequence[int], rounds: int) -> list[Measured]:
    """Steps and time of each window, for a batch of images of several captions."""
    text_BT = texts(generator, batch)
    draw = Draw(
        generator.model, text_BT, list(range(batch)), Sampling.of(generator.config.sampling)
    )
    seeds = list(range(batch))

    def sample(window: int | None = None) -> Tensor:  # on the CPU: once it is there, all is done
        return sample_codes(draw.model, text_BT, seeds, draw.sampling, window=window).cpu()

    expected = sample()
    steps = {}
    for window in chosen:
        found = sample_windows(draw, window)
        _check(found.codes_BN.cpu(), expected)
        steps[window] = found.steps / draw.tokens
    cases = {"1": sample} | {str(w): partial(sample, window=w) for w in chosen}
    times = common.interleaved(cases, rounds)
    rows = [
        Measured(f"batch {batch}, one by one", "an image", "s", [t / batch for t in times["1"]])
    ]
    for window in chosen:
        case, own = f"batch {batch}, window {window}", times[str(window)]
        speed = [one / t for one, t in zip(times["1"], own, strict=True)]
        rows += [
            Measured(case, "share of the steps", "x", [steps[window]]),
            Measured(case, "speed against one by one", "x", speed),
        ]
    if text_BT.device.type == "cpu":
        peak = common.peak_memory(partial(sample, window=chosen[-1]))
        case = f"batch {batch}, window {chosen[-1]}"
        rows.append(Measured(case, "peak memory beyond the model's", "MiB", [peak]))
    return rows


def texts(generator: Generator, batch: int) -> Tensor:
    """text_BT of `batch` captions, the same for any of its parts."""
    length = generator.config.transformer.text_tokens
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    ids = [generator.tokenizer.encode_padded(prompt, length)[0] for prompt in prompts]
    return torch.tensor(ids, device=next(generator.model.parameters()).device)


def _check(found: Tensor, expected: Tensor) -> None:
    if not found.equal(expected):
        raise SystemExit("tokens differ; nothing is timed")


if __name__ == "__main__":
    main()
