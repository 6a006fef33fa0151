"""train-clip as a user runs it, on a handful of captioned images."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from dalle_dist.checkpoint.formats import load_tensors
from dalle_dist.cli import main
from dalle_dist.clip.captions import caption_ids
from dalle_dist.clip.model import LARGEST_LOGIT_SCALE, LossCLIP, decayed, end_of_text
from dalle_dist.clip.release import save_clip_release
from dalle_dist.clip.scorer import CLIPScorer
from dalle_dist.config import load
from dalle_dist.data.image_dataset import ImageDataset
from dalle_dist.data.shards import ShardWriter
from dalle_dist.distributed import process_group
from dalle_dist.errors import ConfigError
from dalle_dist.testing import run_distributed
from dalle_dist.text_tokenizer.bpe import Tokenizer, train_tokenizer
from dalle_dist.train.clip import CLIPStage
from dalle_dist.train.flop import clip_flop
from dalle_dist.train.held_out_clip import HeldOutPairs

COLOURS = ["red", "green", "blue", "orange", "purple", "black"]
THINGS = ["ball", "box", "bar", "frame"]
CAPTIONS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
SHAPE = [
    "tokenizer.vocab_size=300", "data.workers=0", "clip.image_size=16", "clip.patch_size=4",
    "clip.image_width=32", "clip.image_layers=1", "clip.text_width=32", "clip.text_layers=1",
    "clip.text_tokens=12", "clip.features=16", "clip_train.batch_size=24", "clip_train.lr=5e-3",
    "clip_train.lr_steps=60", "clip_train.warmup=5", "clip_train.ema=0.8",
    "clip_train.eval_every=10", "clip_train.sample_every=60", "clip_train.save_every=10",
    "clip_train.log_every=1", "clip_train.precision=fp32",
]  # fmt: skip


def picture(caption, shift=0):
    colour, thing = caption.split()[:2]
    image = Image.new("RGB", (20, 20), "white")
    draw, box = ImageDraw.Draw(image), (3 + shift, 3, 15 + shift, 15)
    if thing == "ball":
        draw.ellipse(box, fill=colour)
    elif thing == "bar":
        draw.rectangle((8 + shift, 1, 11 + shift, 18), fill=colour)
    else:
        draw.rectangle(box, fill=colour if thing == "box" else None, outline=colour, width=2)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder, corrupt=(), texts=None):
    """Shards of all captions, thrice, and a tokenizer; `texts` stand in place of some captions."""
    train_tokenizer(CAPTIONS, 300).save(f"{folder}/tokenizer.json")
    train = [(c, shift, (texts or {}).get(i * 3 + shift, c)) for i, c in enumerate(CAPTIONS)
             for shift in range(3)]  # fmt: skip
    held_out = [(caption, 3, caption) for caption in CAPTIONS[::2]]
    for part, samples in (("train", train), ("held-out", held_out)):
        with ShardWriter(f"{folder}/images/{part}", "images", {}, samples_per_shard=30) as writer:
            for i, (caption, shift, text) in enumerate(samples):
                data = b"broken" if part == "train" and i in corrupt else picture(caption, shift)
                writer.write(f"{i:03d}", {"png": data, "txt": text.encode(), "json": b"{}"})


def arguments(folder, *overrides, run="clip"):
    paths = [f"paths.images={folder}/images", f"paths.clip_run={folder}/{run}"]
    return ["emoji", *paths, f"paths.tokenizer={folder}/tokenizer.json", *SHAPE, *overrides]


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write(folder, corrupt={5, 30}, texts={7: "", 8: " ", 9: "red box " * 40})
    with pytest.warns(UserWarning, match="005"):
        assert main(["train-clip", *arguments(folder, "clip_train.steps=60")]) == 0
    return folder


def test_it_learns_to_tell_held_out_images_by_their_captions(trained):
    log = lines(trained / "clip")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 60
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    found = [line for line in log if "held_out_loss" in line]
    assert [line["step"] for line in found] == [10, 20, 30, 40, 50, 60]
    assert found[-1]["held_out_loss"] < found[0]["held_out_loss"]
    for way in ("image_to_text", "text_to_image"):
        assert found[-1][f"{way}_r10"] >= found[-1][f"{way}_r1"] > 0.6
    assert log[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert {"lr", "grad_norm", "mfu", "images_per_s"} <= log[0].keys()


def test_a_run_leaves_a_release_and_a_sheet_of_nearest_images(trained):
    run = trained / "clip"
    assert sorted(path.name for path in (run / "release").iterdir()) == [
        "checkpoint.sha256", "config.json", "config.yaml", "model.safetensors",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert Image.open(run / "samples/step-00000060-nearest.png").width > 400
    assert list((run / "tensorboard").glob("events*"))


def test_the_release_scores_as_the_run_did(trained):
    """By its own tokenizer and images, cut, empty and special captions included."""
    overrides = [word for word in arguments(trained) if "=" in word]
    config = load("emoji", overrides)
    clip = LossCLIP(config).eval()
    state = load_tensors(trained / "clip/release/model.safetensors")
    clip.load_state_dict(state | {"logit_scale": state["logit_scale"].reshape(1)})
    scorer = CLIPScorer.load(trained / "clip/release")
    tokenizer = Tokenizer.load(config.paths.tokenizer)
    captions = [*CAPTIONS, "", "<pad> <end>", "red box " * 40]
    rows = [caption_ids(tokenizer, caption, 12, end_of_text(config)) for caption in captions]
    dataset = ImageDataset(f"{trained}/images/held-out", None, 16, None, 0)
    images_BCHW = torch.stack([dataset[i].image_CHW for i in range(len(dataset))]) / 255
    files = [picture(caption, 3) for caption in CAPTIONS[::2]]
    pictures = [Image.open(io.BytesIO(data)) for data in files]
    with torch.no_grad():
        image_BD, text_BD = clip.images(images_BCHW), clip.captions(torch.tensor(rows))
    torch.testing.assert_close(scorer.text_features(captions), text_BD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scorer.image_features(pictures), image_BD, rtol=1e-5, atol=1e-6)
    similarity = scorer.image_features(pictures) @ scorer.text_features(CAPTIONS[::2]).T
    hits = (similarity.argmax(1) == torch.arange(12)).double().mean().item()
    assert hits == pytest.approx(lines(trained / "clip")[-1]["image_to_text_r1"])


def test_stopped_and_resumed_equals_never_stopped(tmp_path):
    write(tmp_path)
    for run, steps in (("whole", [12]), ("parts", [6, 12])):
        for number in steps:
            words = arguments(tmp_path, f"clip_train.steps={number}", run=run)
            assert main(["train-clip", *words, "--resume", "auto"]) == 0
    states = [load_tensors(tmp_path / run / "release/model.safetensors")
              for run in ("whole", "parts")]  # fmt: skip
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    logs = [[line["loss"] for line in lines(tmp_path / run) if "loss" in line]
            for run in ("whole", "parts")]  # fmt: skip
    assert logs[0] == logs[1]


def test_a_checkpoint_of_another_tokenizer_or_shape_is_refused(trained, tmp_path, capsys):
    shutil.copytree(trained / "clip", tmp_path / "clip")
    train_tokenizer(["quite", "another"], 280).save(str(tmp_path / "other.json"))
    more = arguments(trained, "clip_train.steps=70", f"paths.clip_run={tmp_path}/clip")
    assert main(["train-clip", *more, f"paths.tokenizer={tmp_path}/other.json",
                 "--resume", "auto"]) == 2  # fmt: skip
    assert "another tokenizer" in capsys.readouterr().err
    assert main(["train-clip", *more, "clip.features=8", "--resume", "auto"]) == 2
    assert "clip.features: 16 -> 8" in capsys.readouterr().err


def _train(ranks, folder, run, *overrides):
    words = arguments(
        Path(folder),
        "clip_train.steps=4",
        "clip_train.warmup=0",
        "clip_train.lr=1e-3",
        *overrides,
        run=run,
    )
    assert main(["train-clip", *words]) == 0


def _same(folder, one, two):
    alone, shared = (lines(folder / run) for run in (one, two))
    names = ("loss", "grad_norm", "held_out_loss", "image_to_text_r1", "text_to_image_r10")
    for name in names:
        expected = [line[name] for line in alone if name in line]
        assert expected
        found = [line[name] for line in shared if name in line]
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-5), name


def test_two_ranks_follow_one(tmp_path):
    """The loss is that among the pairs of both ranks, and so are the gradients."""
    write(tmp_path)
    _train(None, tmp_path, "one")
    run_distributed(_train, 2, str(tmp_path), "two")
    _same(tmp_path, "one", "two")


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_and_accumulated_it_is_the_same_run(tmp_path, stage):
    """Micro-batches of 4 pairs over all ranks, two a step: their pairs are not compared."""
    write(tmp_path)
    _train(None, tmp_path, "one", "clip_train.micro_batch=4")
    sharded = (f"clip_train.zero_stage={stage}", "clip_train.micro_batch=2")
    run_distributed(_train, 2, str(tmp_path), "two", *sharded)
    _same(tmp_path, "one", "two")
    _train(None, tmp_path, "whole")
    losses = [lines(tmp_path / run)[0]["loss"] for run in ("one", "whole")]
    assert losses[0] < losses[1] - 0.3, "fewer pairs are easier to tell apart"


@pytest.mark.slow
def test_bf16_autocast_learns_too(tmp_path):
    write(tmp_path)
    words = arguments(tmp_path, "clip_train.steps=60", "clip_train.precision=bf16")
    assert main(["train-clip", *words]) == 0
    assert lines(tmp_path / "clip")[-1]["image_to_text_r1"] > 0.6


def refusal(capsys, folder, *overrides):
    assert main(["train-clip", *arguments(folder, "clip_train.steps=2", *overrides)]) == 2
    assert not (folder / "clip").exists()
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, capsys):
    write(tmp_path)
    assert "of bpe alone" in refusal(capsys, tmp_path, "tokenizer.kind=words")
    assert "vocab_size: 299, but" in refusal(capsys, tmp_path, "tokenizer.vocab_size=299")
    missing = refusal(capsys, tmp_path, f"paths.tokenizer={tmp_path}/none.json")
    assert "none.json: no such file" in missing
    assert "not a multiple of" in refusal(capsys, tmp_path, "clip_train.micro_batch=5")


def test_without_transformers_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'dalle-dist[clip]'" in refusal(capsys, tmp_path)


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_all_corrupt_is_fatal(tmp_path, capsys):
    write(tmp_path, corrupt=set(range(72)))
    assert "can be decoded" in refusal(capsys, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip.patch_size=5", "clip.image_size: 16 is not a multiple of clip.patch_size 5"),
        ("clip.image_heads=3", "clip.image_width: 32 is not a multiple of clip.image_heads 3"),
        ("clip.text_heads=3", "clip.text_width: 32 is not a multiple of clip.text_heads 3"),
        ("clip_train.crop_min=1.5", "clip_train.crop_min: 1.5 is above clip_train.crop_max"),
    ],
)
def test_sizes_that_do_not_fit_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load("emoji", [*SHAPE, override])


def test_a_batch_tells_which_captions_are_the_same(tmp_path):
    write(tmp_path, texts={7: "", 8: " ", 9: "red box " * 40, 10: "Red Box " * 50})
    overrides = [word for word in arguments(tmp_path, "tokenizer.bpe_dropout=0.5") if "=" in word]
    stage = CLIPStage(load("emoji", overrides), process_group.init())
    samples = [stage.train_set[position] for position in range(72)]
    images_BCHW, text_BT, captions_B = stage.collate(samples)
    assert images_BCHW.shape == (72, 3, 16, 16) and images_BCHW.dtype == torch.uint8
    assert text_BT.equal(stage.collate(samples)[1]), "without dropout"
    numbers = {sample.caption: number for sample, number in zip(samples, captions_B, strict=True)}
    assert numbers["red box " * 40] == numbers["Red Box " * 50]
    assert len(set(captions_B.tolist())) == len(CAPTIONS) + 3
    assert all(300 in row for row in text_BT.tolist())


def test_the_scale_stays_below_100_and_so_does_the_releases(tmp_path):
    write(tmp_path)
    config = load("emoji", [word for word in arguments(tmp_path) if "=" in word])
    clip = LossCLIP(config)
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    text_BT = torch.tensor([[300, *[0] * 11], [5, 300, *[0] * 10]])
    _, scale = clip(torch.rand(2, 3, 16, 16), text_BT, torch.tensor([1, 2]))
    assert scale.item() == pytest.approx(100)
    save_clip_release(str(tmp_path / "release"), config, clip.state_dict())
    kept = load_tensors(tmp_path / "release/model.safetensors")["logit_scale"]
    assert kept.shape == () and kept.item() == pytest.approx(LARGEST_LOGIT_SCALE)


def test_gains_and_biases_do_not_decay():
    clip = LossCLIP(load("emoji", SHAPE))
    kept = {name for name, _ in clip.named_parameters()} - set(decayed(clip))
    assert "logit_scale" in kept and "text_projection.weight" not in kept
    endings = ("bias", "scale", "class_embedding", "norm.weight", "norm1.weight", "norm2.weight")
    assert all(name.endswith((*endings, "layrnorm.weight")) for name in kept)


def test_flop_are_those_of_the_products():
    config = load("emoji", [*SHAPE, "clip.text_layers=2"])
    clip = LossCLIP(config)
    for tower in (clip.text_model, clip.vision_model):
        tower.config._attn_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        clip.images(torch.zeros(1, 3, 16, 16))
        clip.captions(torch.full((1, 12), 300))
    # The counter takes what the causal mask hides for work.
    hidden = 2 * 4 * 32 * (12 * 12 - 12 * 13 // 2)
    assert clip_flop(config.clip) == 3 * (counter.get_total_flops() - hidden)


class _Found:
    """A CLIP whose features are given."""

    logit_scale = torch.zeros(1)

    def images(self, images_BCHW):
        return torch.eye(12)[images_BCHW[:, 0, 0, 0].mul(255).round().long()]

    def captions(self, text_BT):
        return torch.eye(12)[text_BT[:, 0]]


def _measure(ranks):
    def encode(samples):
        numbers = torch.tensor(samples)
        images_BCHW = numbers.byte()[:, None, None, None].expand(-1, 3, 2, 2)
        # Captions 0 and 1 are swapped.
        text_BT = torch.where(numbers < 2, 1 - numbers, numbers)[:, None]
        return images_BCHW, text_BT, numbers

    return HeldOutPairs(range(12), encode, ranks).measure(_Found())


def test_retrieval_by_hand_on_one_rank_and_on_five():
    alone = _measure(process_group.init())
    assert alone["image_to_text_r1"] == alone["text_to_image_r1"] == pytest.approx(10 / 12)
    assert alone["image_to_text_r10"] == 1
    # Eleven others at 0 or 1: log(e + 11) less the own one's.
    loss = torch.tensor(torch.e + 11).log().item() - 10 / 12
    assert alone["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    for found in run_distributed(_measure, 5):
        assert found == pytest.approx(alone)
