"""`dalle-dist convert`: formats are found, written, proven, or refused in one line."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
from test_mindalle import folder as mindalle  # noqa: F401 - a fixture
from test_rudalle import written as write_rudalle

from dalle_dist import Generator, ImageTokenizer
from dalle_dist.checkpoint import formats
from dalle_dist.checkpoint.formats import load_tensors
from dalle_dist.checkpoint.release import load_release, save_dvae_release
from dalle_dist.cli import main
from dalle_dist.dvae.model import DVAE
from dalle_dist.train.transformer import train

WEIGHTS = "transformer.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three steps."""
    place = tmp_path_factory.mktemp("run")
    config = tiny_run.make(place, steps=3, zero_stage=0, prompts=[], eval_every=3)
    train(config)
    return Path(config.paths.run)


def convert(*arguments):
    """The exit status."""
    return main(["convert", *map(str, arguments)])


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "checkpoint.sha256"}


def test_equal_inputs_give_equal_bytes(run, tmp_path, capsys):
    for name in ("one", "two"):
        assert convert(run, tmp_path / name) == 0
    said = capsys.readouterr().out
    assert "checkpoint of train, step 3, written by 1 ranks under ZeRO-0" in said
    assert "largest difference: weights 0, text logits 0, image logits 0" in said
    one, two, own = map(files_of, (tmp_path / "one", tmp_path / "two", run / "release"))
    assert one == two == own and WEIGHTS in one


def test_weights_may_be_raw_and_in_16_bits(run, tmp_path, capsys):
    assert convert(run / "checkpoints", tmp_path / "raw", "--weights", "raw") == 0
    assert convert(run, tmp_path / "small", "--dtype", "bf16") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    average, raw, small = (
        load_tensors(folder / WEIGHTS)
        for folder in (run / "release", tmp_path / "raw", tmp_path / "small")
    )
    assert any(not torch.equal(raw[name], average[name]) for name in average)
    assert all(torch.equal(small[n], average[n].bfloat16()) for n in average)
    off = max((small[n].float() - average[n]).abs().max().item() for n in average)
    assert f"weights {off:.3g}, text logits " in said and off > 0
    assert load_release(tmp_path / "small").transformer.norm.weight.dtype == torch.float32


def test_a_release_becomes_one_of_another_dtype(run, tmp_path, capsys):
    assert convert(run / "release", tmp_path / "half", "--dtype", "fp16") == 0
    assert "release of train\n" in capsys.readouterr().out
    assert {t.dtype for t in load_tensors(tmp_path / "half" / WEIGHTS).values()} == {torch.float16}
    image = Generator.load(tmp_path / "half", device="cpu").generate("red heart")[0].image
    assert image.size == (8, 8)
    before, after = (
        ImageTokenizer.load(p).fingerprint for p in (run / "release", tmp_path / "half")
    )
    assert before == after, "the image tokenizer stays as it is"


def test_large_weights_are_cut_into_files_with_an_index(run, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_FILE", 100_000)
    assert convert(run, tmp_path / "cut") == 0
    names = sorted(p.name for p in (tmp_path / "cut").glob("transformer*"))
    assert len(names) > 3 and names[-1] == f"{WEIGHTS}.index.json"
    assert names[0] == f"transformer-00001-of-{len(names) - 1:05d}.safetensors"
    whole, cut = load_release(run / "release"), load_release(tmp_path / "cut")
    assert whole.fingerprint == cut.fingerprint


def test_inspect_says_what_there_is(run, capsys):
    checkpoint = run / "checkpoints/step-00000003"
    assert convert("--inspect", checkpoint) == 0
    said = capsys.readouterr().out
    for line in (
        "checkpoint of train, step 3",
        "layout: ranks 1, nodes 1, zero_stage 0, precision fp32, moments fp32",
        "exp_avg: 142,460 elements",
        "samples consumed: 24",
        "    norm.weight ",
    ):
        assert line in said
    assert convert("--inspect", run / "release") == 0
    assert "tensors of 142,460 elements" in capsys.readouterr().out
    assert convert("--inspect", run / "release" / WEIGHTS) == 0
    assert "fp32  300 x 64" in capsys.readouterr().out


def test_another_program_comes_in_and_goes_out_again(mindalle, tmp_path, capsys):  # noqa: F811
    assert convert("--inspect", mindalle) == 0
    assert "a model of mindalle" in capsys.readouterr().out
    assert convert(mindalle, tmp_path / "release") == 0
    assert "largest difference: text logits 0, image logits 0, images 0" in capsys.readouterr().out
    assert len(Generator.load(tmp_path / "release", device="cpu").generate("a", n=2)) == 2
    assert convert(tmp_path / "release", tmp_path / "back", "--to", "mindalle") == 0
    assert convert(tmp_path / "back", tmp_path / "again") == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (
        tmp_path / "release" / WEIGHTS
    ).read_bytes()


def test_what_files_do_not_say_is_told_by_hints(tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    write_rudalle(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "release") == 2
    assert "heads" in capsys.readouterr().err
    assert convert(tmp_path / "theirs", tmp_path / "release", "--hint", "heads=2") == 0
    assert convert(tmp_path / "release", tmp_path / "back", "--to", "rudalle") == 0
    said = capsys.readouterr().out
    assert said.endswith("largest difference: text logits 0, image logits 0, images 0\n")


@pytest.mark.parametrize(
    ("goal", "name", "options"),
    [
        ("torch", "model.pt", []),
        ("transformers", "model", ["--weights", "raw"]),
        ("deepspeed-universal", "universal", []),
        *[("deepspeed", f"zero{n}", ["--stage", str(n), "--world", "3"]) for n in range(4)],
    ],
)
def test_a_checkpoint_goes_to_other_formats(run, tmp_path, capsys, goal, name, options):
    assert convert(run, tmp_path / name, "--to", goal, *options) == 0
    said = capsys.readouterr().out
    assert said.endswith("largest difference: weights 0\n")
    files = list((tmp_path / name).rglob("*optim_states.pt"))
    assert len(files) == (3 if name in ("zero1", "zero2", "zero3") else 0)


def test_a_dvae_goes_to_openais_program_and_comes_back(run, tmp_path, capsys):
    config = tiny_run.make(tmp_path)
    shape = dataclasses.replace(config.dvae, downsamplings=3, image_size=32)
    config = dataclasses.replace(config, dvae=shape)
    release = tmp_path / "release"
    save_dvae_release(str(release), config, DVAE(shape).state_dict())
    assert convert(release, tmp_path / "theirs", "--to", "openai-dvae") == 0
    assert capsys.readouterr().out.endswith("largest difference: images 0\n")
    assert convert(tmp_path / "theirs", tmp_path / "ours", "--hint", "image_size=32") == 0
    one, two = (ImageTokenizer.load(place) for place in (release, tmp_path / "ours"))
    assert one.fingerprint == two.fingerprint and two.image_size == 32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "{run}/release"], "is there already; choose another place"),
        (["{run}"], "name what is to be made, after what it is made of"),
        (["{run}", "{new}", "--to", "onnx"], "--to: 'onnx' is not one of release, "),
        (["{deepspeed}", "{new}"], "DeepSpeed's own checkpoint; make a state dict of it"),
        (["{new}", "{new}2"], "no such file"),
        (["{run}/config.yaml", "{new}"], "not a model of openai-dvae, mindalle, rudalle, "),
        (["{run}/release", "{new}", "--to", "mindalle"], "mindalle"),
        (["{run}/release", "{new}", "--to", "deepspeed"], "a release has no optimizer state"),
        (["{mindalle}", "{new}", "--hint", "heads=3"], "--hint heads: of a model of mindalle"),
        (["{mindalle}", "{new}", "--hint", "heads"], "--hint heads: write NAME=N"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    run,
    mindalle,  # noqa: F811
    tmp_path,
    capsys,
    arguments,
    said,
):
    peer = tmp_path / "ds/global_step3"
    peer.mkdir(parents=True)
    (peer / "mp_rank_00_model_states.pt").write_bytes(b"")
    places = {"run": run, "new": tmp_path / "new", "deepspeed": tmp_path / "ds"}
    words = [word.format(**places, mindalle=mindalle) for word in arguments]
    assert convert(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy/checkpoints/step-00000003/average-rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert convert(tmp_path / "copy/checkpoints/step-00000003", tmp_path / "out") == 2
    assert "average-rank-00000.safetensors is damaged" in capsys.readouterr().err
    assert convert(tmp_path / "copy", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "passed over" in said and "checkpoint of train, step 0" in said
