"""The road a user walks, on a few images: data, tokenizer, both stages, images, report."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dalle_dist.checkpoint.release import load_release
from dalle_dist.cli import main
from dalle_dist.config import load
from dalle_dist.metrics.caption_gain import caption_losses
from dalle_dist.testing import run_distributed
from dalle_dist.transformer.loss import Loss

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("ball", "box", "bar")
SMALL = [
    "dvae.image_size=16", "dvae.codebook_size=16", "transformer.codebook_size=16",
    "dvae.width=8", "dvae.decoder_stem=8",
    "dvae.downsamplings=2", "transformer.image_grid=4", "data.workers=0",
    "dvae_train.batch_size=6", "dvae_train.steps=20", "dvae_train.warmup=2",
    "dvae_train.eval_every=10",
    "dvae_train.log_every=2", "tokenizer.vocab_size=300", "transformer.layers=4",
    "transformer.width=64", "transformer.heads=1", "transformer.text_tokens=12",
    "transformer.conv_kernel=3", "train.batch_size=6", "train.micro_batch=3", "train.steps=8",
    "train.warmup=2",
    "train.log_every=1", "train.eval_every=4", "train.sample_every=8", "train.save_every=8",
    "train.prompts=[red ball]", "train.halve_at=[]",
]  # fmt: skip


def draw(folder):
    folder.mkdir()
    for i, colour in enumerate(COLOURS):
        for j, shape in enumerate(SHAPES):
            image = Image.new("RGB", (24, 20), "white")
            box = (2, 2, 6 + 4 * j, 10 + 2 * i)
            pen = ImageDraw.Draw(image)
            (pen.ellipse if shape == "ball" else pen.rectangle)(box, fill=colour)
            image.save(folder / f"{colour}-{shape}.png")
            (folder / f"{colour}-{shape}.txt").write_text(f"a {colour} {shape}\n")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "broken.txt").write_text("a broken image")


def _walk(ranks, folder, setting):
    """In a process of its own: DeepSpeed cannot be started twice in one."""
    for verb in (["tokenizer", "train"], ["train-dvae"], ["encode"], ["train"], ["report"]):
        assert main([*verb, "emoji", *setting]) == 0, verb
    generate = ["generate", f"{folder}/run/release", "a red ball", "a blue box", "-n", "2"]
    assert main([*generate, "--seed", "1", "-o", f"{folder}/drawn"]) == 0
    assert main(["convert", f"{folder}/run", f"{folder}/converted"]) == 0


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("road")
    draw(folder / "images")
    build = ["data", "build", str(folder / "images"), str(folder / "images")]
    assert main([*build, "--held-out", "0.3"]) == 0
    names = ("images", "tokens", "tokenizer", "dvae_run", "run")
    places = dict(zip(names, ("images", "tokens", "tokenizer.json", "dvae", "run"), strict=True))
    setting = [f"paths.{name}={folder}/{place}" for name, place in places.items()] + SMALL
    run_distributed(_walk, 1, str(folder), setting)
    return folder


def test_the_road_ends_in_a_report(walked):
    text = (walked / "run/report.html").read_text()
    assert "<h2>Captions it never saw</h2>" in text
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 4
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "the page must be self-contained"
    assert "<h1>dalle-dist: data set images, run run (config emoji)</h1>" in text
    assert re.search(r"<td>20 steps, 9.23 epochs, \d+ min \d\d s from start", text)
    assert re.search(r"<td>8 steps, 3.69 epochs, \d+ min \d\d s from start", text)
    assert "/images: 13 images to train on, 5 held out</td>" in text
    assert "guidance 2.0, guidance schedule constant</td>" in text
    figures = json.loads((walked / "run/figures.json").read_text())
    assert figures["held-out images"] >= 2
    assert 3 < figures["PSNR of reconstructions, dB (mean over images)"] < 60
    assert 0 < figures["share of codes in use"] <= 1
    assert 0 < figures["SSIM of reconstructions (mean over images)"] < 1
    assert 1 <= figures["perplexity of the codes"] <= 16 * figures["share of codes in use"] + 0.1
    assert 0 <= figures["identification R@1"] <= figures["identification R@10"] <= 1
    assert 1 <= figures["identification, median rank"] <= figures["held-out images"]
    gain = figures["what the caption is worth, nats/token"]
    right = figures["image loss, right caption, nats/token"]
    shuffled = figures["image loss, captions shuffled, nats/token"]
    assert gain == pytest.approx(shuffled - right, abs=2e-3)
    image = Image.open(walked / "run/report.png").convert("L")
    assert image.width > 800 and image.getextrema()[0] < 100


def test_prompts_become_pictures(walked):
    names = sorted(path.name for path in (walked / "drawn").iterdir())
    assert names[-2:] == ["grid.png", "manifest.json"] and len(names) == 6
    images = json.loads((walked / "drawn/manifest.json").read_text())["images"]
    model = load_release(str(walked / "run/release")).fingerprint
    assert {entry["model"] for entry in images} == {model}
    assert Image.open(walked / "drawn" / images[0]["file"]).size == (16, 16)


def test_three_lines_of_python_draw_the_same(walked):
    from dalle_dist import Generator

    generator = Generator.load(str(walked / "run/release"))
    image = generator.generate("a blue box", n=2, seed=1)[1].image
    same = list((walked / "drawn").glob("a-blue-box-01-*.png"))
    assert image.tobytes() == Image.open(same[0]).tobytes()


def test_a_converted_checkpoint_is_the_release(walked):
    ours, theirs = (load_release(str(walked / name)) for name in ("run/release", "converted"))
    assert ours.fingerprint == theirs.fingerprint
    assert ours.image_tokenizer.fingerprint == theirs.image_tokenizer.fingerprint


def test_a_run_folder_holds_what_it_promises(walked):
    names = {path.name for path in (walked / "run").iterdir()}
    assert {"config.yaml", "log.jsonl", "tensorboard", "samples", "checkpoints", "release"} <= names
    assert not list(Path(walked).rglob("*.tmp"))
    assert not list((walked / "run/release").glob("*.pt"))
    log = [json.loads(line) for line in (walked / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert load(str(walked / "run/config.yaml")).name == "emoji"


def test_identification_is_over_the_whole_held_out_set(walked):
    """Against the images themselves, by the images that `generate` makes of the same captions."""
    from dalle_dist import Generator
    from dalle_dist.data.image_dataset import ImageDataset
    from dalle_dist.metrics.identification import identify

    config = load(str(walked / "run/config.yaml"))
    images = ImageDataset(f"{config.paths.images}/held-out", None, 16, None, 0)
    true = [images[i] for i in range(len(images))]
    generator = Generator.load(str(walked / "run/release"))
    made = [generator.generate(one.caption, seed=config.seed)[0].codes_N for one in true]
    made_BCHW = generator.image_tokenizer.decode(torch.stack(made))
    ranks = identify(made_BCHW, torch.stack([one.image_CHW for one in true]).float() / 255)
    figures = json.loads((walked / "run/figures.json").read_text())
    assert figures["identification, median rank"] == ranks.double().quantile(0.5).item()
    share = (ranks == 1).double().mean().item()
    assert figures["identification R@1"] == pytest.approx(share, abs=1e-3)


def test_the_table_shows_the_training_image_nearest_to_the_first_sample(walked):
    from dalle_dist import Generator
    from dalle_dist.data.image_dataset import ImageDataset

    config = load(str(walked / "run/config.yaml"))
    parts = {
        part: ImageDataset(f"{config.paths.images}/{part}", None, 16, None, 0)
        for part in ("train", "held-out")
    }
    train, held_out = ([part[i] for i in range(len(part))] for part in parts.values())
    generator = Generator.load(str(walked / "run/release"))
    nearest, nearer = [], 0
    for one in held_out:
        made = generator.generate(one.caption, seed=config.seed)[0].image
        pixels = torch.from_numpy(np.array(made)).permute(2, 0, 1).int()
        far = [int((pixels - other.image_CHW.int()).square().sum()) for other in [one, *train]]
        nearer += min(far[1:]) < far[0]
        nearest.append((one.caption, train[far[1:].index(min(far[1:]))].caption))
    text = (walked / "run/report.html").read_text()
    listed = text[text.index("<h2>Captions of the nearest training images</h2>") :]
    assert re.findall(r"<tr><td>(.*)</td><td>(.*)</td></tr>", listed) == nearest
    assert "among all 13 training images" in text and "5 of 5 held-out ones" in text
    figures = json.loads((walked / "run/figures.json").read_text())
    share = figures["share of samples nearer to a training image than to the true one"]
    assert share == pytest.approx(nearer / 5, abs=1e-3)


def test_a_collapse_of_stage_1_is_told_in_red(walked, tmp_path, capsys):
    assert '<p class="warning">' not in (walked / "run/report.html").read_text()
    shutil.copytree(walked / "run", tmp_path / "run")
    line = json.dumps({"step": 20, "time": 2e9, "codes_collapsed": 1.0})
    (tmp_path / "dvae").mkdir()
    (tmp_path / "dvae/log.jsonl").write_text((walked / "dvae/log.jsonl").read_text() + line + "\n")
    places = [f"paths.run={tmp_path}/run", f"paths.dvae_run={tmp_path}/dvae"]
    assert main(["report", str(walked / "run/config.yaml"), *places]) == 0
    assert "WARNING: The codes had collapsed" in capsys.readouterr().out
    text = (tmp_path / "run/report.html").read_text()
    assert '<p class="warning">The codes had collapsed at stage 1' in text


class Biased:
    """Predicts images perfectly when the caption's first token is the image's first code."""

    def __call__(self, text_BT, codes_BN):
        right = (text_BT[:, 0] == codes_BN[:, 0]).sum()
        count = torch.tensor(float(codes_BN.numel()))
        return Loss(count, count, 2.0 * (len(text_BT) - right) * codes_BN.shape[1], count)


def test_caption_losses_shuffle_every_caption_away():
    numbers = torch.arange(11)[:, None]
    losses = caption_losses(Biased(), numbers.repeat(1, 3), numbers.repeat(1, 4), batch_size=4)
    assert (losses.right, losses.shuffled, losses.gain) == (0, 2, 2)
