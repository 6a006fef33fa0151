"""Stage 1 as a user runs it, on a handful of images."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from dalle_dist.checkpoint.formats import load_tensors
from dalle_dist.cli import main
from dalle_dist.config import load
from dalle_dist.data.shards import ShardSet, ShardWriter
from dalle_dist.distributed import process_group
from dalle_dist.dvae.loss_model import LossDVAE, gumbel_noise
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.testing import run_distributed
from dalle_dist.train.dvae import DVAEStage, dvae_engine

COLOURS = ["red", "green", "blue", "orange", "purple", "black"]
SHAPE = [
    "dvae.image_size=16", "dvae.codebook_size=16", "transformer.codebook_size=16",
    "dvae.width=8", "dvae.decoder_stem=8",
    "dvae.downsamplings=2", "transformer.image_grid=4", "data.workers=0",
    "dvae_train.batch_size=8", "dvae_train.lr=3e-3", "dvae_train.eval_every=10",
    "dvae_train.save_every=10", "dvae_train.log_every=1", "dvae_train.precision=fp32",
    "dvae_train.warmup=0",
]  # fmt: skip
OTHER_CODEBOOK = ["dvae.codebook_size=32", "transformer.codebook_size=32"]


def picture(i):
    image = Image.new("RGB", (20, 20), "white")
    box = (2 + i % 4, 2, 14, 10 + i % 7)
    ImageDraw.Draw(image).ellipse(box, fill=COLOURS[i % len(COLOURS)])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(folder, corrupt=()):
    for part, numbers in (("train", range(24)), ("held-out", range(24, 32))):
        with ShardWriter(str(folder / part), "images", {}, samples_per_shard=10) as writer:
            for i in numbers:
                data = b"broken" if i in corrupt else picture(i)
                caption = f"{COLOURS[i % len(COLOURS)]} ball"
                writer.write(f"{i:03d}", {"png": data, "txt": caption.encode(), "json": b"{}"})


def arguments(folder, *overrides, run="dvae"):
    paths = [f"paths.images={folder}/images", f"paths.dvae_run={folder}/{run}"]
    return ["emoji", *paths, f"paths.tokens={folder}/tokens", *SHAPE, *overrides]


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    write_images(folder / "images", corrupt={5, 30})
    with pytest.warns(UserWarning, match="005"):
        assert main(["train-dvae", *arguments(folder, "dvae_train.steps=60")]) == 0
    return folder


def test_it_learns_and_leaves_a_whole_run(trained):
    log = lines(trained / "dvae")
    losses = [line["nll"] for line in log if "nll" in line]
    assert len(losses) == 60
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5
    evaluated = [line for line in log if "psnr" in line]
    assert [line["step"] for line in evaluated] == [10, 20, 30, 40, 50, 60]
    assert evaluated[-1]["psnr"] > evaluated[0]["psnr"]
    assert {"kl", "elb", "temperature", "kl_weight", "lr", "images_per_s"} <= log[0].keys()
    run = trained / "dvae"
    assert sorted(p.name for p in (run / "release").iterdir()) == [
        "checkpoint.sha256",
        "config.yaml",
        "dvae.safetensors",
    ]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "latest",
        "step-00000050",
        "step-00000060",
    ]
    assert Image.open(run / "samples" / "step-00000060-reconstructions.png").width > 400
    assert list((run / "tensorboard").glob("events*"))


def test_a_finished_run_says_so_and_a_used_folder_is_refused(trained, capsys):
    before = (trained / "dvae/log.jsonl").read_text()
    done = arguments(trained, "dvae_train.steps=60")
    assert main(["train-dvae", *done, "--resume", "auto"]) == 0
    assert "complete at step 60; nothing to do" in capsys.readouterr().out
    assert main(["train-dvae", *done]) == 2
    assert "holds a run; go on with --resume auto" in capsys.readouterr().err
    assert (trained / "dvae/log.jsonl").read_text() == before


def test_resuming_with_another_shape_shows_the_difference(trained, capsys):
    changed = arguments(trained, "dvae_train.steps=90", *OTHER_CODEBOOK)
    assert main(["train-dvae", *changed, "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert "cannot resume with another shape: dvae.codebook_size: 16 -> 32" in error


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_stopped_and_resumed_equals_never_stopped(tmp_path):
    write_images(tmp_path / "images")
    schedule = ["dvae_train.lr_steps=20", "dvae_train.temperature_steps=20"]
    whole = arguments(tmp_path, "dvae_train.steps=20", *schedule, run="whole")
    assert main(["train-dvae", *whole]) == 0
    half = arguments(tmp_path, "dvae_train.steps=10", *schedule, run="parts")
    assert main(["train-dvae", *half]) == 0
    both = arguments(tmp_path, "dvae_train.steps=20", *schedule, run="parts")
    assert main(["train-dvae", *both, "--resume", "auto"]) == 0
    states = [
        load_tensors(tmp_path / run / "release/dvae.safetensors") for run in ("whole", "parts")
    ]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    logs = [[line.get("nll") for line in lines(tmp_path / run)] for run in ("whole", "parts")]
    assert logs[0] == logs[1]


def _train(ranks, folder, run="two", *options):
    overrides = ("dvae_train.steps=5", "dvae_train.warmup=0")
    assert main(["train-dvae", *arguments(Path(folder), *overrides, run=run), *options]) == 0
    assert not torch.distributed.is_initialized(), "a group that outlives main may abort at exit"


def test_two_ranks_follow_one(tmp_path):
    write_images(tmp_path / "images")
    _train(None, tmp_path, run="one")
    run_distributed(_train, 2, str(tmp_path))
    one, two = (load_tensors(tmp_path / run / "release/dvae.safetensors") for run in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    alone, shared = (lines(tmp_path / run) for run in ("one", "two"))
    for name in ("nll", "kl"):
        expected = [line[name] for line in alone if name in line]
        assert len(expected) == 5
        found = [line[name] for line in shared if name in line]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_unsharded_weights_are_channels_last_and_read_in_their_own_order():
    config = load("emoji", [*SHAPE, "dvae.width=4"])
    engine = dvae_engine(LossDVAE(config.dvae), config.dvae_train, process_group.init())
    images_BCHW, noise_BKGG = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 4, 4)
    weight = engine.module.encoder.group_1_block_1.residual[0].weight
    before = weight.detach().clone()
    engine.backward(engine(images_BCHW, noise_BKGG, 1.0).sum())
    engine.step(1e-3)
    pieces = {piece.name: piece.values for piece in engine.weights()}
    process_group.shutdown()
    for name, parameter in engine.module.named_parameters():
        assert pieces[name].equal(parameter.detach().flatten())
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert not weight.equal(before)


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    shutil.copytree(trained / "images", tmp_path / "images")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_a_half_written_release_is_written_anew(copy):
    (copy / "dvae/release/config.yaml").unlink()
    before = (copy / "dvae/release/dvae.safetensors").read_bytes()
    (copy / "dvae/release/dvae.safetensors").write_bytes(before[:100])
    done = arguments(copy, "dvae_train.steps=60")
    assert main(["train-dvae", *done, "--resume", "auto"]) == 0
    assert (copy / "dvae/release/dvae.safetensors").read_bytes() == before
    assert (copy / "dvae/release/config.yaml").is_file()


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_a_damaged_checkpoint_is_named_or_passed_over(copy, capsys):
    newest = copy / "dvae/checkpoints/step-00000060"
    with (newest / "average-rank-00000.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"damage")
    done = arguments(copy, "dvae_train.steps=60")
    assert main(["train-dvae", *done, "--resume", str(newest)]) == 2
    assert "average-rank-00000.safetensors is damaged" in capsys.readouterr().err
    assert main(["train-dvae", *done, "--resume", str(copy / "nowhere")]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    shutil.rmtree(copy / "dvae/release")
    assert main(["train-dvae", *done, "--resume", "auto"]) == 0
    assert lines(copy / "dvae")[-1]["step"] == 60


def test_it_goes_on_from_a_run_or_one_of_its_checkpoints(copy, capsys):
    more = arguments(copy, "dvae_train.steps=62")
    for place in (copy / "dvae/checkpoints/step-00000050", copy / "dvae"):
        assert main(["train-dvae", *more, "--resume", str(place)]) == 0
        assert "complete at step 62" in capsys.readouterr().out
        steps = [line["step"] for line in lines(copy / "dvae") if "nll" in line]
        assert steps == list(range(1, 63))
        shutil.rmtree(copy / "dvae/checkpoints/step-00000062")


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_checkpoint_stays(copy, capsys):
    wild = arguments(copy, "dvae_train.steps=90", "dvae_train.lr=1e30", "dvae_train.skip_budget=5")
    assert main(["train-dvae", *wild, "--resume", "auto"]) == 2
    assert "resume from the last checkpoint with a lower dvae_train.lr" in capsys.readouterr().err
    steps = sorted(path.name for path in (copy / "dvae/checkpoints").iterdir())
    assert steps == ["latest", "step-00000050", "step-00000060"]


def test_an_image_that_fails_costs_no_checkpoint(copy, monkeypatch):
    def broken(*_):
        raise RuntimeError("no image today")

    monkeypatch.setattr(DVAEStage, "validate", broken)
    with pytest.raises(RuntimeError, match="no image today"):
        main(["train-dvae", *arguments(copy, "dvae_train.steps=70"), "--resume", "auto"])
    assert (copy / "dvae/checkpoints/step-00000070").is_dir()


def test_what_was_cut_off_after_a_save_is_measured_when_it_goes_on(copy, monkeypatch):
    """The process died between the checkpoint of the last step and its evaluation."""
    log = copy / "dvae/log.jsonl"
    kept = [line for line in lines(copy / "dvae") if not (line["step"] == 60 and "psnr" in line)]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(copy / "dvae/samples")
    assert main(["train-dvae", *arguments(copy, "dvae_train.steps=60"), "--resume", "auto"]) == 0
    assert [line["step"] for line in lines(copy / "dvae") if "psnr" in line] == list(
        range(10, 61, 10)
    )
    assert (copy / "dvae/samples/step-00000060-reconstructions.png").is_file()


def test_the_release_is_that_of_the_step_that_the_run_is_at(copy, capsys):
    """Not of a later checkpoint that lies there too."""
    newest = copy / "dvae/checkpoints/step-00000050"
    done = arguments(copy, "dvae_train.steps=50")
    assert main(["train-dvae", *done, "--resume", str(newest)]) == 0
    assert main(["convert", str(newest), str(copy / "fifty")]) == 0
    there, wanted = (copy / name / "dvae.safetensors" for name in ("dvae/release", "fifty"))
    assert there.read_bytes() == wanted.read_bytes()


def test_without_zero_any_number_of_ranks_may_go_on(tmp_path):
    write_images(tmp_path / "images")
    assert main(["train-dvae", *arguments(tmp_path, "dvae_train.steps=3", run="two")]) == 0
    run_distributed(_train, 2, str(tmp_path), "two", "--resume", "auto")
    assert [line["step"] for line in lines(tmp_path / "two") if "nll" in line] == [1, 2, 3, 4, 5]


def _sharded(ranks, folder, stage):
    overrides = ("dvae_train.steps=6", f"dvae_train.zero_stage={stage}", "dvae_train.micro_batch=2")
    assert main(["train-dvae", *arguments(Path(folder), *overrides, run=f"zero{stage}")]) == 0


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_and_accumulated_it_is_the_same_run(tmp_path, stage):
    """Two ranks that share the weights, two micro-batches each, against one process."""
    write_images(tmp_path / "images")
    assert main(["train-dvae", *arguments(tmp_path, "dvae_train.steps=6", run="one")]) == 0
    run_distributed(_sharded, 2, str(tmp_path), stage)
    one, two = (lines(tmp_path / run) for run in ("one", f"zero{stage}"))
    for name in ("nll", "kl", "psnr", "codes_in_use"):
        alone, shared = ([line[name] for line in log if name in line] for log in (one, two))
        assert shared == pytest.approx(alone, rel=2e-4, abs=1e-4), name


def test_noise_is_each_samples_own_and_standard_gumbel():
    shape, cpu = (8, 5, 5), torch.device("cpu")
    both = gumbel_noise(shape, 1, [7, 9], cpu)
    assert both[1].equal(gumbel_noise(shape, 1, [9], cpu)[0])
    assert not both[0].equal(both[1]) and not both[0].equal(gumbel_noise(shape, 2, [7], cpu)[0])
    noise = gumbel_noise((200_000,), 1, [0], cpu)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.01)


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_encode_writes_the_argmax_codes_once(trained, capsys):
    assert main(["encode", *arguments(trained)]) == 0
    out = capsys.readouterr().out
    assert "23 images, 1 corrupt images skipped" in out
    tokenizer = DVAETokenizer.load(str(trained / "dvae/release"))
    tokens = ShardSet(str(trained / "tokens/train"), "tokens")
    assert tokens.index.meta["image_tokenizer"] == tokenizer.fingerprint
    assert (len(tokens), tokens.index.meta["grid"]) == (23, 4)
    import numpy as np

    from dalle_dist.data.image_dataset import ImageDataset

    images = ImageDataset(str(trained / "images/train"), None, 16, None, 0)
    for i, source in ((0, 0), (5, 6), (22, 23)):
        sample, image = tokens.read(i), images.read(source)
        codes = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        assert codes.dtype == np.uint16
        assert json.loads(sample["json"])["source"] == image.key == f"{source:03d}"
        assert sample["txt"].decode() == image.caption
        expected = tokenizer.encode(image.image_CHW[None].float() / 255)
        assert codes.tolist() == expected.flatten().tolist()
    assert main(["encode", *arguments(trained)]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_encode_refuses_what_does_not_belong_together(trained, tmp_path, capsys):
    write_images(tmp_path / "images")
    assert main(["train-dvae", *arguments(tmp_path, "dvae_train.steps=2")]) == 0
    assert main(["encode", *arguments(tmp_path, f"paths.tokens={trained}/tokens2")]) == 0
    other = arguments(trained, f"paths.tokens={trained}/tokens2")
    assert main(["encode", *other]) == 2
    assert "holds tokens of another image tokenizer" in capsys.readouterr().err
    assert main(["encode", *arguments(trained, *OTHER_CODEBOOK)]) == 2
    assert "transformer.codebook_size: 32, but the image tokenizer" in capsys.readouterr().err


def test_all_corrupt_is_fatal(tmp_path, capsys):
    write_images(tmp_path / "images", corrupt=set(range(32)))
    with pytest.warns(UserWarning):
        assert main(["train-dvae", *arguments(tmp_path, "dvae_train.steps=2")]) == 2
    assert "can be decoded" in capsys.readouterr().err
