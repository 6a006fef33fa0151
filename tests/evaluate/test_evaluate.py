"""`dalle-dist evaluate` as a whole: the right figures, and the same however it is carried out."""

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_dist import Generator, storage
from dalle_dist.cli import main
from dalle_dist.clip.scorer import CLIPScorer
from dalle_dist.data.shards import ShardWriter
from dalle_dist.distributed import process_group
from dalle_dist.evaluate.data import Data
from dalle_dist.evaluate.distances import gaussian_of
from dalle_dist.evaluate.options import Options
from dalle_dist.evaluate.rows import gathered
from dalle_dist.evaluate.run import evaluate
from dalle_dist.evaluate.samples import Samples
from dalle_dist.evaluation import inception
from dalle_dist.evaluation.blur import blur
from dalle_dist.evaluation.frechet import frechet_distance
from dalle_dist.evaluation.prepare import stack
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.metrics.identification import identify, summary
from dalle_dist.testing import run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:guidance")
N, COUNT, FEATURES, CLASSES = 4, 70, 72, 12


def options(place, out, **changed):
    given = {
        "inception": str(place / "inception.pt"), "lpips": str(place / "vgg.pt"),
        "clip": str(place / "clip"), "score_clip": str(place / "judge"),
        "rerank": str(place / "clip"), "candidates": N,
    }  # fmt: skip
    return Options(str(place / "release"), str(place / "data"), str(out), **(given | changed))


def table(out):
    """{(name, candidates, blur, network): value}, and the lines themselves."""
    with (out / "figures.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    keys = [(i["name"], i["candidates"], i["blur"], i["network"].split(",")[0]) for i in lines]
    assert len(set(keys)) == len(keys)
    return {key: float(line["value"]) for key, line in zip(keys, lines, strict=True)}, lines


def alone(place, out, **changed):
    evaluate(options(place, out, **changed), process_group.init())
    return table(out)


def small_inception(change):
    """Fewer features and classes: distances of 2,048 take seconds each."""
    change(inception, "FEATURES", FEATURES)
    change(inception, "CLASSES", CLASSES)
    change(inception.Inception, "dim", FEATURES)


@pytest.fixture(autouse=True, scope="module")
def _small_inception():
    with pytest.MonkeyPatch.context() as patch:
        small_inception(patch.setattr)
        yield


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of a whole evaluation by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    alone(place, out)
    return out


def on_ranks(ranks, chosen):
    small_inception(setattr)
    evaluate(chosen, ranks)
    return gathered(ranks, 20, lambda part: torch.tensor([[i] for i in part]), 3).flatten().tolist()


def test_all_measures_are_there(whole):
    found, lines = table(whole)
    names = {name for name, *_ in found}
    assert names == {
        "text loss", "image loss", "caption gain", "PSNR of reconstructions",
        "SSIM of reconstructions", "LPIPS of reconstructions", "share of codes in use",
        "perplexity of the codes", "rFID", "rFD (CLIP)", "FID", "FD (CLIP)", "inception score",
        "CLIP score", "CLIP score of the true images", "identification R@1",
        "identification R@10", "self-check: a known pair of Gaussians",
    }  # fmt: skip
    for name in ("FID", "FD (CLIP)", "inception score"):
        curve = [(n, blur) for found_name, n, blur, _ in found if found_name == name]
        assert curve == [("1", "0"), ("2", "0"), *(("4", blur) for blur in "01248")]
    for line in lines:
        if line["name"] in ("FID", "rFID", "FD (CLIP)", "rFD (CLIP)"):
            assert float(line["halves"]) > 0
            assert ("too few" in line["note"]) == ("CLIP" not in line["name"])
            assert len(line["fingerprint"]) in (16, 64) and '"filter": "box"' in line["preparation"]
        assert line["model"] and line["image_tokenizer"] and line["chosen_by"]
    assert np.isfinite(list(found.values())).all()


def test_ranks_batches_and_an_end_midway_change_no_figure(place, whole, tmp_path, monkeypatch):
    expected = (whole / "figures.csv").read_bytes()
    rows = run_distributed(on_ranks, 2, options(place, tmp_path / "ranks"))
    assert rows == [list(range(20)), []]
    assert (tmp_path / "ranks/figures.csv").read_bytes() == expected

    codes, calls = Generator.codes, []

    def cut(self, wanted, *rest):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(wanted))
        return codes(self, wanted, *rest)

    monkeypatch.setattr(Generator, "codes", cut)
    with pytest.raises(KeyboardInterrupt):
        alone(place, tmp_path / "cut", batch_size=16)
    assert not (tmp_path / "cut/figures.csv").exists()
    monkeypatch.setattr(
        Generator, "codes", lambda *given: calls.append(len(given[1])) or codes(*given)
    )
    alone(place, tmp_path / "cut", batch_size=16)
    assert sum(calls) == N * COUNT, "nothing was sampled twice"
    assert (tmp_path / "cut/figures.csv").read_bytes() == expected


def test_curves_are_those_of_brute_force(place, whole):
    found, _ = table(whole)
    clip, judge = (CLIPScorer.load(place / name) for name in ("clip", "judge"))
    data = Data(str(place / "data"))
    captions = data.captions
    generator = Generator.load(place / "release", device="cpu")
    made = [sample.image for sample in generator.generate(captions, n=N)]
    scores = clip.score(made, [caption for caption in captions for _ in range(N)]).view(-1, N)
    network = torch.jit.load(str(place / "inception.pt"))
    true = [data.image(i).resize((8, 8), Image.Resampling.BOX) for i in range(len(data))]

    def distance(images, radius):
        pixels = [stack([blur(image, radius) for image in part]) for part in (true, images)]
        with pytest.warns(UserWarning, match="full rank"):
            return frechet_distance(
                *(gaussian_of(network(part, return_features=True)) for part in pixels)
            )

    for n in (1, 2, 4):
        best = [made[c * N + int(scores[c, :n].argmax())] for c in range(len(captions))]
        score = judge.score(best, captions).mean().item()
        assert found["CLIP score", str(n), "", "CLIP"] == pytest.approx(score, rel=1e-4)
        assert found["FID", str(n), "0", "Inception"] == pytest.approx(distance(best, 0), rel=1e-4)
        shares = summary(identify(stack(best), stack(true)))
        for k in (1, 10):
            name = f"identification R@{k}"
            assert found[name, str(n), "", ""] == pytest.approx(shares[f"r{k}"], rel=1e-5)
    for radius in (1, 8):
        value = found["FID", "4", str(radius), "Inception"]
        assert value == pytest.approx(distance(best, radius), rel=1e-4)


def test_the_set_against_itself_is_at_no_distance(place, tmp_path, monkeypatch):
    """A tokenizer that loses nothing: its codes are ignored, and its images those it was given."""
    given = []
    encode = DVAETokenizer.encode
    monkeypatch.setattr(DVAETokenizer, "encode", lambda s, x: given.append(x) or encode(s, x))
    monkeypatch.setattr(DVAETokenizer, "decode", lambda self, codes: given[-1])
    release = str(place / "dvae_run/release")
    evaluate(
        Options(
            release, str(place / "data"), str(tmp_path), clip=str(place / "clip"),
            inception=str(place / "inception.pt"), lpips=str(place / "vgg.pt"),
        ),
        process_group.init(),
    )  # fmt: skip
    found, _ = table(tmp_path)
    names = {name: value for (name, *_), value in found.items()}
    assert names["rFID"] < 1e-9 and names["rFD (CLIP)"] < 1e-9
    assert names["LPIPS of reconstructions"] == 0 and names["SSIM of reconstructions"] == 1
    assert "FID" not in names and "image loss" not in names
    assert "all of generated images" in (tmp_path / "report.html").read_text()


def test_true_images_in_place_of_samples_are_at_no_distance(place, tmp_path, monkeypatch):
    def true(self, captions, candidates):
        return [self._subject.true(self.numbers[caption]) for caption in captions]

    monkeypatch.setattr(Samples, "images", true)
    found, _ = alone(place, tmp_path, candidates=1, rerank=None)
    assert [value for (name, *_), value in found.items() if name == "identification R@1"] == [1]
    distances = [value for (name, *_), value in found.items() if name in ("FID", "FD (CLIP)")]
    assert len(distances) == 10 and max(distances) < 1e-9


def test_kept_moments_take_the_place_of_the_images(place, whole, tmp_path, capsys):
    kept = str(tmp_path / "moments")
    first, _ = alone(place, tmp_path / "a", save_reference=kept)
    assert len(list((tmp_path / "moments").iterdir())) == 10
    assert first == table(whole)[0]
    again, lines = alone(place, tmp_path / "b", reference=kept)
    assert again == pytest.approx(first, rel=1e-5)
    notes = {line["note"] for line in lines if line["name"] == "FID"}
    assert all("moments of 70 images in" in note for note in notes)
    halves = [line["halves"] for line in table(whole)[1]]
    assert [line["halves"] for line in lines] == halves
    one = f"{kept}/fid-blur-0.safetensors"
    with pytest.raises(Exception, match="measured with preparation"):
        alone(place, tmp_path / "c", reference=one, size=12)


def test_fewer_captions_are_spread(place, tmp_path):
    _, lines = alone(place, tmp_path, captions=5, candidates=1, rerank=None, clip=None)
    images = {line["name"]: line["images"] for line in lines}
    assert images["FID"] == images["identification R@1"] == "5"
    assert images["image loss"] == images["rFID"] == str(COUNT)
    page = (tmp_path / "report.html").read_text()
    assert "rerank curves" in page and "paper, COCO (another data set): FID" in page


def test_the_report_shows_captions_curves_and_figures(whole):
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    for text in ("FID, best of 4, blur 8", "27.5, 28, 45.5", "two halves of the reference"):
        assert text in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_judge_that_chose_is_called_so(place, whole, tmp_path):
    _, lines = alone(place, tmp_path, score_clip=None, captions=5, candidates=2, inception=None)
    notes = [line["note"] for line in lines if line["name"] == "CLIP score"]
    assert notes == ["", "by the CLIP that chose the images: biased upwards"]
    assert not any("chose" in line["note"] for line in table(whole)[1])


def test_an_evaluation_on_s3(place, bucket):
    out = f"{bucket}/out"
    few = options(place, out, captions=5, candidates=1, rerank=None, clip=None, inception=None)
    for _ in range(2):  # the second finds the first one's candidates
        evaluate(few, process_group.init())
    names = storage.list_files(out)
    assert names[1:] == ["figures.csv", "report.html"] and names[0].startswith("candidates/")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--candidates", "3"], "not one of 1, 2, 4"),
        (["--candidates", "4"], "need one another"),
        (["--captions", "0"], "--captions: 0 is below 1"),
        (["--reference", "x.npz"], "needs a feature network"),
        (["--clip", "CLIP/nothing"], "no CLIP (config.json is missing)"),
        (["--inception", "CLIP/config.json"], "not a TorchScript file"),
        (["--filter", "nearest"], "filter=nearest: one of box"),
        (["--temperature", "-1"], "--temperature"),
    ],
)
def test_errors_are_one_line(place, tmp_path, capsys, words, said):
    words = [word.replace("CLIP", str(place / "clip")) for word in words]
    out = tmp_path / "out"
    assert main(["evaluate", f"{place}/release", f"{place}/data", "-o", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not out.exists()


def test_damaged_images_and_foreign_folders_are_refused(place, tmp_path, capsys):
    with ShardWriter(str(tmp_path / "data"), "images", {}) as writer:
        writer.write("broken", {"png": b"no image", "txt": b"red heart"})
    words = ["evaluate", f"{place}/release", f"{tmp_path}/data", "-o"]
    assert main([*words, f"{tmp_path}/out"]) == 2
    assert "broken cannot be decoded" in capsys.readouterr().err
    with ShardWriter(str(tmp_path / "mute"), "images", {}) as writer:
        writer.write("broken", {"png": b"not looked at", "txt": b" "})
    assert main(["evaluate", f"{place}/release", f"{tmp_path}/mute", "-o", f"{tmp_path}/out"]) == 2
    assert "all captions are empty" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*words, str(tmp_path)]) == 2
    assert "not of an evaluation" in capsys.readouterr().err
