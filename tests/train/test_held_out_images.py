"""Stage 1's measures: shared by ranks, by the averaged weights; and when codes collapse."""

import json

import pytest
import torch
from test_train_dvae import arguments, lines, write_images

from dalle_dist.cli import main
from dalle_dist.config import load
from dalle_dist.distributed import process_group
from dalle_dist.metrics.codes import code_counts, share_in_use
from dalle_dist.metrics.reconstruction import psnr, reconstruct, ssim
from dalle_dist.testing import run_distributed
from dalle_dist.train import held_out_images
from dalle_dist.train.dvae import DVAEStage
from dalle_dist.train.held_out_images import averaged_dvae, collapse
from dalle_dist.train.state import TrainingState


def validated(ranks, given):
    """Measures of the first weights, whose average differs from them."""
    stage = DVAEStage(load(given[0], given[1:]), ranks)
    torch.manual_seed(0)
    engine = stage.build_engine(ranks)
    state = TrainingState(
        stage.identity,
        ranks,
        engine,
        stage.ema(),
        stage.schedule(),
        stage.progress(),
    )
    state.ema.update(engine.weights())
    for piece in engine.weights():
        piece.values.detach().mul_(1.1)
    dvae = averaged_dvae(stage.config.dvae, state)
    return stage.validate(state), {k: v.numpy() for k, v in dvae.state_dict().items()}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out-images")
    write_images(folder / "images")
    return arguments(folder)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_measures_are_the_same_on_one_rank_and_on_two(given, zero_stage):
    """Eight images, three on one of three ranks."""
    given = [*given, "dvae_train.batch_size=6", f"dvae_train.zero_stage={zero_stage}"]
    ((one, weights),) = run_distributed(validated, 1, given)
    for world in (2, 3):
        for found, theirs in run_distributed(validated, world, given):
            assert found == pytest.approx(one, rel=1e-6)
            assert all((theirs[name] == weights[name]).all() for name in weights)


def test_measures_are_those_of_all_images_at_once(given, monkeypatch):
    monkeypatch.setattr(held_out_images, "BATCH", 3)
    stage = DVAEStage(load(given[0], given[1:]), process_group.init())
    ((found, weights),) = run_distributed(validated, 1, given)
    with torch.device("meta"):
        dvae = held_out_images.DVAE(stage.config.dvae)
    tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
    dvae.load_state_dict(tensors, assign=True)
    images = held_out_images.image_stack(stage.held_out, range(8)).float() / 255
    codes, decoded = reconstruct(dvae, images)
    counts = code_counts(codes, 16)
    shares = counts[counts > 0].double() / counts.sum()
    nats = -(shares * shares.log()).sum().item()
    assert found == pytest.approx(
        {
            "psnr": psnr(images, decoded).mean().item(),
            "ssim": ssim(images, decoded).mean().item(),
            "codes_in_use": share_in_use(counts),
            "codes_entropy": nats,
            "codes_perplexity": torch.tensor(nats).exp().item(),
        },
        rel=1e-5,
    )
    ours = held_out_images.HeldOutImages(stage.held_out, process_group.init()).measure(dvae)
    assert ours == pytest.approx(found, rel=1e-6)


def measures(perplexity, in_use):
    return {"codes_perplexity": perplexity, "codes_in_use": in_use}


def test_codes_collapse_below_half_of_their_best():
    log = [{"step": 1, "loss": 2.0}, measures(100.0, 0.5), measures(80.0, 0.8)]
    assert collapse(3, measures(50.0, 0.4), log) == ({"codes_collapsed": 0.0}, "")
    assert collapse(3, measures(1.0, 0.1), []) == ({"codes_collapsed": 0.0}, "")
    for fallen in (measures(49.0, 0.8), measures(100.0, 0.39)):
        numbers, line = collapse(3000, fallen, log)
        assert numbers == {"codes_collapsed": 1.0}
        assert "step 3,000: " in line and "\n" not in line
        assert "dvae_train.clip=1, a shorter dvae_train.kl_steps or a lower dvae_train.lr" in line
    assert "perplexity 49, was 100" in collapse(3, measures(49.0, 0.8), log)[1]


def test_a_resumed_run_remembers_its_best(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images")
    perplexities = iter([12.0, 9.0, 5.0])

    def validate(stage, state):
        return measures(next(perplexities), 0.5)

    monkeypatch.setattr(DVAEStage, "validate", validate)
    assert main(["train-dvae", *arguments(tmp_path, "dvae_train.steps=20")]) == 0
    assert "COLLAPSE" not in capsys.readouterr().out
    more = arguments(tmp_path, "dvae_train.steps=30")
    assert main(["train-dvae", *more, "--resume", "auto"]) == 0
    assert "step 30: THE CODES COLLAPSE: perplexity 5, was 12" in capsys.readouterr().out
    logged = [line["codes_collapsed"] for line in lines(tmp_path / "dvae") if "psnr" not in line
              and "codes_collapsed" in line]  # fmt: skip
    assert json.dumps(logged) == "[0.0, 0.0, 1.0]"
