"""Identification: ranks by pixel distance, and the metric of a training run."""

import dataclasses
import random
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dalle_dist.data.token_dataset import TokenSample
from dalle_dist.distributed import process_group
from dalle_dist.metrics import identification, registry
from dalle_dist.metrics.identification import distances, identify, nearest, summary
from dalle_dist.metrics.registry import Evaluation, measure
from dalle_dist.testing import run_distributed
from dalle_dist.train.run import read_log
from dalle_dist.train.transformer import train
from tests.tiny_run import make

NAMES = ("identification_r1", "identification_r10", "identification_rank")


def test_ranks_are_those_of_pixel_distances():
    generator = torch.Generator().manual_seed(1)
    made, true = torch.rand(2, 12, 3, 5, 4, generator=generator)
    made = made * 0.93 + true * 0.07  # some are nearest, not all
    expected = []
    for i in range(12):
        distances = [float(((made[i] - other) ** 2).sum()) for other in true]
        expected.append(sorted(distances).index(distances[i]) + 1)
    assert identify(made, true).tolist() == expected
    assert 1 < len(set(expected)) < 12


def test_equally_near_images_count_as_nearer():
    true = torch.rand(4, 3, 8, 8)
    true[2] = true[0]
    assert identify(true, true).tolist() == [2, 1, 2, 1]
    assert identify(torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)).tolist() == [3, 3, 3]


def test_the_nearest_image_is_found_exactly_whatever_the_chunks():
    generator = torch.Generator().manual_seed(2)
    images, others = torch.randint(256, (2, 40, 3, 6, 5), generator=generator).byte()
    others[:8] = images[3:11]
    others[3, 0, 0, 0] ^= 1  # all but a copy: off by one in one channel of one pixel
    squares = (images[:, None].long() - others[None].long()).square().sum(dim=(2, 3, 4))
    assert torch.equal(distances(images, others).long(), squares)
    for chunk in (40, 7, 1):
        index_B, distance_B = nearest(images, others.split(chunk))
        assert index_B.tolist() == squares.argmin(dim=1).tolist()
        assert distance_B.tolist() == squares.amin(dim=1).tolist()
    assert distance_B[3:11].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_of_equally_near_images_the_first_is_nearest():
    others = torch.tensor([9, 5, 3, 5, 3]).byte()[:, None, None, None].expand(-1, 3, 2, 2)
    for chunk in (5, 2, 1):
        index_B, distance_B = nearest(others[[1, 2, 0]], others.split(chunk))
        assert index_B.tolist() == [1, 2, 0] and not distance_B.any()
        index_B, distance_B = nearest(others[:1] - 5, others.split(chunk))
        assert (index_B.item(), distance_B.item()) == (1, 12)
    assert [t.tolist() for t in nearest(others[:1], [])] == [[-1], [torch.inf]]


def test_summary_of_ranks():
    assert summary(torch.tensor([1, 10, 11, 40])) == {"r1": 0.25, "r10": 0.5, "rank": 10.5}


@dataclasses.dataclass
class Brightness:
    """Of an image tokenizer: one grey per image, its first code."""

    seen: list

    def decode(self, codes_BN):
        self.seen.append(codes_BN)
        return (codes_BN[:, 0] / 1000)[:, None, None, None].expand(-1, 3, 2, 2)


class Engine:
    @contextmanager
    def sampling_model(self, build):
        yield "model"


def test_the_first_captions_are_sampled_once_each(monkeypatch, tmp_path):
    """A model that swaps the images of the first two captions."""
    held_out = [TokenSample(*(torch.full((n,), i) for n in (2, 4, 4))) for i in range(70)]
    random.Random(0).shuffle(held_out)
    seeds_seen = []

    def sample_codes(model, text_BT, seeds, kept_codes=None):
        assert model == "model"
        seeds_seen.extend(seeds)
        codes_B = text_BT[:, 0].clone()
        codes_B[[0, 1]] = codes_B[[1, 0]]
        return codes_B[:, None].expand(-1, 4)

    monkeypatch.setattr(identification, "sample_codes", sample_codes)
    tokenizer, ranks = Brightness([]), process_group.init()
    config = make(tmp_path)
    evaluation = Evaluation(Engine(), held_out, 2, ranks, config, tokenizer)
    found = measure(["identification"], evaluation)
    assert found["identification_r1"] == 62 / 64 and found["identification_rank"] == 1
    assert [len(codes) for codes in tokenizer.seen] == [64, 64]
    assert seeds_seen == [config.seed + i for i in range(registry.MOST_IDENTIFIED)]


def trained(ranks, config):
    warnings.simplefilter("ignore")
    train(config)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_sharded_run_logs_it_after_each_evaluation(tmp_path, zero_stage):
    config = make(
        tmp_path, metrics=["identification"], eval_every=2, zero_stage=zero_stage, steps=4
    )
    run_distributed(trained, 2, config)
    lines = [line for line in read_log(Path(config.paths.run)) if NAMES[0] in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        r1, r10, rank = (line[name] for name in NAMES)
        assert r1 in (0, 1 / 3, 2 / 3, 1) and r10 == 1 and 1 <= rank <= 3
