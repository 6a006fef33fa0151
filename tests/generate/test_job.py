"""Requests of any size to files: the same by one process or many, cut off or not."""

import io
import json

import pytest
import torch
from PIL import Image

from dalle_dist import Generator, storage
from dalle_dist.cli import main
from dalle_dist.data.labelled_grid import to_image
from dalle_dist.data.shards import ShardSet
from dalle_dist.distributed import process_group
from dalle_dist.errors import UserError
from dalle_dist.generate import generator as generator_module
from dalle_dist.generate.job import Job, run
from dalle_dist.generate.request import Request, Settings
from dalle_dist.generate.sampling_options import Sampling
from dalle_dist.testing import run_distributed

PROMPTS = ["red heart", "blue car", "red heart"]


class Brightness:
    """Scores by how bright an image is, and by how long its caption."""

    fingerprint = "b" * 16

    def score(self, images, captions):
        means = [sum(image.convert("L").tobytes()) / 1e4 for image in images]
        return torch.tensor(means) + torch.tensor([float(len(caption)) for caption in captions])


def files(folder, keep="*"):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob(keep))
        if path.is_file()
    }


def job(generator, out, n=5, keep=None, prompts=PROMPTS, **options):
    request = Request(prompts, n, generator.settings(seed=4))
    return Job(request, str(out), keep or n, **options)


def carry_out(ranks, release, out, options):
    generator = Generator.load(release, device="cpu")
    scorer = Brightness() if options.pop("scored", False) else None
    return run(job(generator, out, scorer=scorer, **options), generator, ranks)


def alone(release, out, **options):
    return carry_out(process_group.init(), release, out, options)


def entries(folder):
    return json.loads((folder / "manifest.json").read_text())["images"]


@pytest.mark.parametrize(
    "options",
    [{}, {"scored": True, "keep": 2}, {"tar": True}, {"tar": True, "scored": True, "keep": 3}],
)
def test_ranks_batches_and_windows_do_not_change_a_byte(release, tmp_path, options):
    release = release()
    assert alone(release, tmp_path / "one", **options) == 3 * options.get("keep", 5)
    expected = files(tmp_path / "one")
    for batch_size, window in ((1, None), (4, 3), (64, 1)):
        out = tmp_path / f"{batch_size}"
        alone(release, out, batch_size=batch_size, window=window, **options)
        assert files(out) == expected
    for world in (2, 4):
        out = tmp_path / f"ranks {world}"
        counts = run_distributed(
            carry_out, world, release, out, {"batch_size": 4, **options}, threads=1
        )
        assert counts == [3 * options.get("keep", 5)] * world
        assert files(out) == expected


@pytest.mark.parametrize("tar", [False, True])
def test_a_job_that_was_cut_off_goes_on_where_it_was(release, tmp_path, monkeypatch, tar):
    release, sampled, out = release(), [], tmp_path / "cut"
    options = {"batch_size": 4, "scored": True, "keep": 2, "tar": tar}
    alone(release, tmp_path / "whole", **options)
    sample_codes = generator_module.sample_codes

    def cut_off(model, text_BT, *rest, **more):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append(len(text_BT))
        return sample_codes(model, text_BT, *rest, **more)

    monkeypatch.setattr(generator_module, "sample_codes", cut_off)
    with pytest.raises(KeyboardInterrupt):
        alone(release, out, **options)
    assert sampled == [4, 4] and len(files(out, "*.npz")) == 2
    sampled[:] = []
    alone(release, out, **options)
    assert sampled == [4, 3]
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("tar", [False, True])
def test_a_job_on_s3_writes_and_goes_on_as_on_a_disk(release, tmp_path, bucket, monkeypatch, tar):
    release, out = release(), f"{bucket}/images"
    options = {"batch_size": 4, "scored": True, "keep": 2, "tar": tar}
    alone(release, tmp_path / "whole", **options)
    sample_codes, sampled = generator_module.sample_codes, []

    def cut_off(model, text_BT, *rest, **more):
        sampled.append(len(text_BT))
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return sample_codes(model, text_BT, *rest, **more)

    monkeypatch.setattr(generator_module, "sample_codes", cut_off)
    with pytest.raises(KeyboardInterrupt):
        alone(release, out, **options)
    assert len(storage.list_files(out)) == 2
    alone(release, out, **options)
    assert sampled == [4, 4, 4, 4, 3]
    found = {name: storage.read_bytes(f"{out}/{name}") for name in storage.list_files(out)}
    assert found == files(tmp_path / "whole")


def test_a_job_cut_off_while_it_writes_goes_on_too(release, tmp_path, monkeypatch):
    release, out = release(), tmp_path / "cut"
    alone(release, tmp_path / "whole")
    images = Generator.images

    def cut_off(self, codes_BN):
        if list(out.glob("*.png")):
            raise KeyboardInterrupt
        return images(self, codes_BN)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Generator, "images", cut_off)
        alone(release, out)
    assert list(out.glob("*.png")) and not (out / "manifest.json").exists()
    alone(release, out)
    assert files(out) == files(tmp_path / "whole")


def test_the_best_by_score_are_those_of_brute_force(release, tmp_path):
    release = release()
    alone(release, tmp_path, n=9, keep=4, batch_size=5, scored=True, prompts=PROMPTS[:2])
    generator = Generator.load(release, device="cpu")
    for number, prompt in enumerate(PROMPTS[:2]):
        all_ = generator.generate(prompt, n=9, seed=4)
        scores = Brightness().score([image.image for image in all_], [prompt] * 9)
        scores = [round(score, 4) for score in scores.tolist()]
        best = sorted(range(9), key=lambda i: (-scores[i], i))[:4]
        kept = entries(tmp_path)[4 * number :][:4]
        assert [entry["index"] for entry in kept] == best
        assert [entry["rank"] for entry in kept] == [1, 2, 3, 4]
        assert [entry["score"] for entry in kept] == [scores[i] for i in best]
        assert {entry["scored_by"] for entry in kept} == {"b" * 16}
        for entry in kept:
            with Image.open(tmp_path / entry["file"]) as image:
                assert image.tobytes() == all_[entry["index"]].image.tobytes()


def test_a_prompt_that_stands_there_twice_gets_other_images():
    request = Request(PROMPTS, 2, Settings(0, Sampling()))
    assert len(request) == 6
    assert [request[i] for i in range(6)] == [
        ("red heart", 0), ("red heart", 1), ("blue car", 0), ("blue car", 1), ("red heart", 2),
        ("red heart", 3),
    ]  # fmt: skip
    settings = [Settings(seed, Sampling(top_k=k)) for seed in (0, 1) for k in (0, 1)]
    requests = [Request(PROMPTS, 2, s) for s in settings]
    digests = {r.digest(range(a, b)) for r in requests for a, b in ((0, 2), (2, 4), (0, 3))}
    assert len(digests) == 12
    with pytest.raises(UserError, match="more than 1,048,576 images of one prompt"):
        Request(PROMPTS, 2**19 + 1, Settings(0, Sampling()))


def test_shards_hold_images_captions_and_entries(release, tmp_path):
    release = release()
    alone(release, tmp_path / "tar", tar=True, n=2)
    alone(release, tmp_path / "png", n=2)
    shards = ShardSet(str(tmp_path / "tar"), "images")
    shards.verify_all()
    samples = [shards.read(i) for i in range(len(shards))]
    assert [s["__key__"].decode() for s in samples[:3]] == [
        "00000000-00000", "00000000-00001", "00000001-00000"
    ]  # fmt: skip
    for sample, entry in zip(samples, entries(tmp_path / "png"), strict=True):
        assert sample["png"] == (tmp_path / "png" / entry.pop("file")).read_bytes()
        assert sample["txt"].decode() == entry["prompt"] and json.loads(sample["json"]) == entry
    assert shards.index.meta["generated"]["candidates"] == 2


def test_shards_are_not_mixed_with_anything(release, tmp_path):
    release = release()
    alone(release, tmp_path, tar=True, n=1)
    with pytest.raises(UserError, match="holds shards already"):
        alone(release, tmp_path, tar=True, n=1)
    (tmp_path / "index.json").unlink()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which is not a shard of generated"):
        alone(release, tmp_path, tar=True, n=1)


def test_the_command_reads_prompts_from_files_and_shards(release, tmp_path):
    release, prompts = release(), tmp_path / "prompts.txt"
    prompts.write_text("\ufeffred heart\n\n  blue car \nred heart\n", encoding="utf-8")
    command = ["generate", release, "-n", "2", "--seed", "4", "--format", "tar"]
    assert main([*command, "--prompts", str(prompts), "-o", str(tmp_path / "tar")]) == 0
    assert (
        main([*command[:-2], "--captions", str(tmp_path / "tar"), "-o", str(tmp_path / "png")]) == 0
    )
    assert [entry["prompt"] for entry in entries(tmp_path / "png")[::2]] == [
        "red heart", "red heart", "blue car", "blue car", "red heart", "red heart"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompts: give them as words, or --prompts FILE, or --captions SHARDS"),
        (["a", "--prompts", "x"], "prompts: give them as words"),
        (["--prompts", "empty.txt"], "empty.txt: holds no prompt"),
        (["--prompts", "latin.txt"], "latin.txt: not UTF-8 (byte 3)"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
        (["a", "--keep", "1"], "--keep: 1 needs --rerank"),
        (["a", "-n", "2", "--keep", "3", "--rerank", "clip"], "--keep: 3 needs --rerank, and at"),
        (["a", "--keep", "0", "--rerank", "clip"], "--keep: 0 is below 1"),
        (["a", "--window", "0"], "--window: 0 is below 1"),
    ],
)
def test_what_does_not_fit_is_one_line(release, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert main(["generate", release(), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "generated").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_sample_and_are_named(release, tmp_path, precision):
    release = release()
    command = ["generate", release, "red heart", "-n", "2", "-o", str(tmp_path)]
    assert main([*command, "--precision", precision]) == 0
    assert main(command) == 0
    found = [entry["precision"] for entry in entries(tmp_path)]
    assert found == [precision, precision, "fp32", "fp32"]
    exact, lower = (Generator.load(release, "cpu", p) for p in ("fp32", precision))
    assert exact.model.blocks[0].mlp.up.weight.dtype == torch.float32
    assert lower.model.blocks[0].mlp.up.weight.dtype == getattr(
        torch, {"bf16": "bfloat16", "fp16": "float16"}[precision]
    )
    assert lower.model.image_unembedding.weight.dtype == torch.float32
    text_BT = torch.full((1, exact.config.transformer.text_tokens), 5)
    codes_BN = torch.zeros(1, exact.config.transformer.image_tokens).long()
    logits = [g.model.logits(text_BT, codes_BN)[1] for g in (exact, lower)]
    assert 0 < (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()


def test_pixels_are_what_the_tokenizer_decodes(release, tmp_path):
    release = release()
    alone(release, tmp_path, n=1, prompts=["red heart"])
    generator = Generator.load(release, device="cpu")
    (one,) = generator.generate("red heart", seed=4)
    expected = to_image(generator.image_tokenizer.decode(one.codes_N[None])[0])
    (entry,) = entries(tmp_path)
    with Image.open(io.BytesIO((tmp_path / entry["file"]).read_bytes())) as image:
        assert image.tobytes() == expected.tobytes()
