"""Parts of a report, without a run: which captions, the table's layout, what is said of the run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_dist.config import from_dict
from dalle_dist.data.shards import ShardWriter
from dalle_dist.errors import DataError
from dalle_dist.report import facts, inputs, measures, report
from dalle_dist.report.figures import CAPTION, CELL, HEAD, HEADINGS_TOP, Row, table
from dalle_dist.report.page import Section, page
from dalle_dist.report.samples import CAPTIONS, chosen_captions

LONG = "an extraordinarily long caption that goes on and on, "


def test_captions_are_spread_over_the_held_out_set_and_the_same_each_time():
    captions = [f"caption {i}" for i in range(240)]
    assert chosen_captions(captions) == list(range(0, 240, 10))
    assert chosen_captions(captions[:7]) == list(range(7))
    assert len(chosen_captions(captions[:25])) == CAPTIONS
    captions[0] = captions[1] = captions[239] = " \n"
    chosen = chosen_captions(captions)
    assert chosen[0] == 2 and len(set(chosen)) == CAPTIONS and chosen == sorted(chosen)
    with pytest.raises(DataError, match="all of them are empty"):
        chosen_captions(["", " "])


def row(caption, nearest_caption):
    true, nearest, sample = (Image.new("RGB", (8, 8), c) for c in ("red", "blue", "lime"))
    return Row(caption, true, nearest, nearest_caption, [sample] * 4)


def boxes(canvas, colour):
    """(left, top, right, bottom) around all pixels of a colour, and how many they are."""
    marked = (canvas == colour).all(axis=2)
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), marked.sum()


@pytest.mark.parametrize("caption", ["red heart", LONG * 5, LONG.replace(" ", "") * 5])
def test_nothing_in_the_table_hides_anything_else(caption):
    shown = [row(caption, caption)] * 6
    canvas = np.asarray(table(shown, "a title", "a note", columns=2))
    half = canvas[:, : canvas.shape[1] // 2]
    (left, top, right, _), count = boxes(half, (255, 0, 0))
    assert (left, top, right - left) == (CAPTION + 6, HEAD, CELL) and count == 3 * CELL**2
    nearest, count = boxes(half, (0, 0, 255))
    assert nearest[0] > right and nearest[2] - nearest[0] == CELL and count == 3 * CELL**2
    samples, count = boxes(half, (0, 255, 0))
    assert samples[0] > nearest[2] and count == 3 * 4 * CELL**2
    assert canvas.shape[1] // 2 > samples[2]

    def text(part):
        return part.max(axis=2) < 200  # grey and black; images have a channel of 255

    captions, heads = text(half[HEAD:, :left]), text(half[HEADINGS_TOP:HEAD])
    assert captions[:, -2:].sum() == 0 and captions.any()
    assert not text(half[HEAD:, left:]).any()
    # Each row's captions end above the next row's.
    for k in range(1, 3):
        start = k * (CELL + 6)
        assert not captions[start - 2 : start + 1].any() and captions[start : start + 20].any()
    # Each heading stands above its own images, and ends before the next.
    for start, end in ((left, right), (nearest[0], nearest[2]), (samples[0], samples[0] + CELL)):
        assert heads[:, start:end].any() and not heads[:, end : end + 6].any()
    assert not heads[:, : left - 1].any() and not heads[-2:].any()
    assert not text(half[HEADINGS_TOP - 4 : HEADINGS_TOP]).any()


def test_warnings_are_for_few_codes_and_for_codes_that_collapsed():
    well = [{"codes_collapsed": 1.0}, {"loss": 1.0}, {"codes_collapsed": 0.0}, {"loss": 1.0}]
    assert facts.warnings(0.05, well) == facts.warnings(0.4, []) == []
    (few,) = facts.warnings(0.049, [])
    assert "Only 4.9%" in few
    (fallen,) = facts.warnings(0.4, [*well, {"codes_collapsed": 1.0}, {"loss": 1.0}])
    assert "collapsed at stage 1's last evaluation" in fallen
    assert len(facts.warnings(0.0, [{"codes_collapsed": 1.0}])) == 2


def test_warnings_are_red_and_all_text_is_escaped():
    text = page("<t>", ["a < b"], [Section("c & d", [("<i>", 2), ("<i>", 3)])])
    assert '<p class="warning">a &lt; b</p>' in text and ".warning { color: #c00" in text
    assert "<h2>c &amp; d</h2>" in text and "<t>" not in text
    assert text.count("<tr><td>&lt;i&gt;</td>") == 2 and "<img" not in text
    assert '<p class="warning">' not in page("t", [], [])


def test_a_stage_lasts_from_its_start_to_its_logs_last_line():
    log = [
        {"step": 10, "time": 1000.0, "seconds_per_step": 2.0, "epoch": 0.5},
        {"step": 20, "time": 1050.0, "seconds_per_step": 2.0, "epoch": 1.0},
        {"step": 20, "time": 1075.4, "psnr": 20.0},
    ]
    assert facts.length(log).startswith("20 steps, 1.00 epochs, 1 min 35 s from start")
    log[-1]["time"] += 2 * 3600
    assert "2 h 01 min from start" in facts.length(log)
    assert facts.length([{"step": 3, "time": 5.0}]).startswith("3 steps, 0 min 00 s")
    assert facts.length([]) == "its log is empty"


@pytest.mark.parametrize(
    ("images", "run", "expected"),
    [
        ("data/my-birds", "runs/second", "data set my-birds, run second (config emoji)"),
        ("s3://bucket/birds/", "s3://bucket/runs/b", "data set birds, run b (config emoji)"),
    ],
)
def test_the_title_names_the_data_and_the_run(images, run, expected):
    config = from_dict({"name": "emoji", "paths": {"images": images, "run": run}})
    assert facts.title(config) == f"dalle-dist: {expected}"


def test_samples_are_compared_with_the_first_training_images(tmp_path, monkeypatch):
    """Seven of twelve, of which the third cannot be decoded."""
    with ShardWriter(str(tmp_path / "train"), "images", {}) as writer:
        for i in range(12):
            path = tmp_path / "image.png"
            Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
            data = b"no image" if i == 2 else path.read_bytes()
            writer.write(f"{i:03}", {"png": data, "txt": f"image {i}".encode()})
    monkeypatch.setattr(inputs, "TRAINING_IMAGES", 7)
    monkeypatch.setattr(inputs, "CHUNK", 3)
    train = inputs.TrainingImages(from_dict({"paths": {"images": str(tmp_path)}}), 4)
    assert (len(train), train.total) == (7, 12)
    with pytest.warns(UserWarning, match="002 cannot be decoded"):
        chunks = [chunk[:, 0, 0, 0].tolist() for chunk in train]
    assert chunks == [[0, 1], [3, 4, 5], [6]]
    assert [train.sample(i).caption for i in (1, 2, 5)] == ["image 1", "image 3", "image 6"]
    assert train.words == {"image", *"013456"}
    said = facts.table_facts(1, 30, train)
    assert "among the first 7 of 12 training images" in said["nearest in training"]
    assert said["words trained on"].endswith("of the first 7 of 12 training images")
    assert said["captions shown"].startswith("1 of 30 held-out ones")


def test_rows_and_figures_are_each_of_their_own_samples(tmp_path, monkeypatch):
    """Image i of 30 is grey of value 8 i; a sample is 3 brighter, the other figures' 1 brighter."""
    greys = (torch.arange(30) * 8).byte()[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    captions = [f"grey {i}" for i in range(30)]

    class Greys:
        def generate(self, prompts, n, seed):
            values = [8 * int(prompt.split()[1]) + 3 for prompt in prompts for _ in range(n)]
            images = [Image.new("RGB", (4, 4), (value,) * 3) for value in values]
            return [SimpleNamespace(image=image) for image in images]

    monkeypatch.setattr(report, "sample_captions", lambda *_: (greys.float() + 1) / 255)
    with ShardWriter(str(tmp_path / "train"), "images", {}) as writer:
        for value in range(3, 250, 16):  # as bright as the samples of every second caption
            Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / "image.png")
            data = (tmp_path / "image.png").read_bytes()
            writer.write(f"{value:03}", {"png": data, "txt": f"value {value}".encode()})
    config = from_dict({"paths": {"images": str(tmp_path)}})
    held_out = inputs.HeldOut(captions, greys, torch.zeros(30, 1), torch.zeros(30, 1))
    train = inputs.TrainingImages(config, 4)
    rows, figures = report.sample(config, Greys(), held_out, train)
    chosen = chosen_captions(captions)
    assert [row.caption for row in rows] == [captions[i] for i in chosen]
    assert [row.true.getpixel((0, 0))[0] for row in rows] == [8 * i for i in chosen]
    for i, row in zip(chosen, rows, strict=True):
        value = int(row.nearest_caption.split()[1])
        assert abs(value - 8 * i - 3) == (0 if i % 2 == 0 else 8)
        assert row.nearest.getpixel((0, 0)) == (value,) * 3
        assert [sample.getpixel((0, 0))[0] for sample in row.samples] == [8 * i + 3] * 4
    assert figures["share of captions all of whose words were trained on"] == 0  # none has "grey"
    # 1 from its true image, 2 or 6 from one that was trained on.
    assert figures["share of samples nearer to a training image than to the true one"] == 0
    assert figures["identification R@1"] == 1
    monkeypatch.setattr(report, "sample_captions", lambda *_: (greys.float() + 2) / 255)
    _, figures = report.sample(config, Greys(), held_out, train)
    # 2 from its true image, 1 from that of every second caption.
    assert figures["share of samples nearer to a training image than to the true one"] == 0.5


def test_captions_of_known_words_are_told_apart():
    """Samples of the first two captions are right; the others have words of their own."""
    greys = (torch.arange(4) * 60).byte()[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    captions = ["A red box", "blue, box!", "blue lorry", "moai"]
    held_out = inputs.HeldOut(captions, greys, torch.zeros(4, 1), torch.zeros(4, 1))
    generated = greys[[0, 1, 3, 2]].float() / 255

    def figures(*words):
        return measures.identification_figures(generated, held_out, torch.zeros(4), set(words))

    found = figures("a", "red", "box", "blue")
    assert found["identification R@1"] == 0.5
    assert found["share of captions all of whose words were trained on"] == 0.5
    assert found["identification R@1, these captions"] == 1
    assert found["identification R@10, these captions"] == 1
    whole = figures("a", "red", "box", "blue", "lorry", "moai")
    assert whole["share of captions all of whose words were trained on"] == 1
    assert not any("these captions" in name for name in whole)
