import json
import warnings
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from tiny_generator import build, text

from dalle_dist.errors import UserError
from dalle_dist.generate import outputs
from dalle_dist.generate.outputs import write_outputs
from dalle_dist.generate.request import Settings
from dalle_dist.generate.sampler import FREE, sample_codes
from dalle_dist.generate.sampling_options import Sampling


@pytest.mark.parametrize("masks", ["paper", "causal"])
@pytest.mark.parametrize("variant", ["paper", "clamp", "torus", "dalle-pytorch"])
def test_decoding_step_by_step_equals_the_full_forward(masks, variant):
    model = build(f"transformer.masks={masks}", f"transformer.mask_variant={variant}").model
    codes_BN = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(6))
    _, expected = model.logits(text(), codes_BN)
    caches = model.prefill(text(), [1, 1, 1])
    held_B = torch.full((3,), model.image_embedding.start)
    for state in range(16):
        logits_BK = model.step(held_B[:, None], caches, state)[:, 0]
        torch.testing.assert_close(logits_BK, expected[:, state], rtol=1e-4, atol=1e-4)
        held_B = codes_BN[:, state]


def test_decoding_in_bf16_is_as_exact_as_the_full_forward():
    exact, model = build().model, build(dtype=torch.bfloat16).model
    codes_BN = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(6))
    _, truth = exact.logits(text(), codes_BN)
    full_error = (model.logits(text(), codes_BN)[1] - truth).norm()
    caches, held_B = model.prefill(text(), [1, 1, 1]), torch.full((3,), model.image_embedding.start)
    steps = []
    for state in range(16):
        steps.append(model.step(held_B[:, None], caches, state)[:, 0])
        held_B = codes_BN[:, state]
    assert steps[0].dtype == torch.float32
    assert (torch.stack(steps, 1) - truth).norm() <= 1.5 * full_error
    assert sample_codes(model, text(), [1, 2, 3]).shape == (3, 16)


def test_a_sample_does_not_depend_on_its_batch():
    model = build().model
    together = sample_codes(model, text(), [1, 2, 3])
    alone = [sample_codes(model, text()[i : i + 1], [i + 1])[0] for i in range(3)]
    assert together.equal(torch.stack(alone))
    assert not together.equal(sample_codes(model, text(), [1, 2, 4]))


def test_prefix_is_kept_and_the_rest_follows_it():
    model = build().model
    free = sample_codes(model, text(), [1, 2, 3])
    given = torch.where(torch.arange(16) < 7, free, FREE)
    assert sample_codes(model, text(), [1, 2, 3], kept_codes=given).equal(free)
    given[:, :7] = (free[:, :7] + 1) % 20
    other = sample_codes(model, text(), [1, 2, 3], kept_codes=given)
    assert other[:, :7].equal(given[:, :7]) and not other[:, 7:].equal(free[:, 7:])


def test_pictures_depend_on_seed_prompt_and_index_alone():
    generator = build()
    one = generator.generate("a red heart", n=3, seed=1)
    many = generator.generate(["a blue car", "a red heart"], n=3, seed=1, batch_size=2)
    assert [p.prompt for p in many] == ["a blue car"] * 3 + ["a red heart"] * 3
    for a, b in zip(one, many[3:], strict=True):
        assert a.codes_N.equal(b.codes_N) and a.image.tobytes() == b.image.tobytes()
    settings = [Settings(seed, Sampling()) for seed in (0, 1)]
    assert len({s.sample_seed(p, i) for s in settings for p in "ab" for i in (0, 1)}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ""}, "a prompt is empty"),
        ({"prompts": []}, "a prompt is empty"),
        ({"n": 0}, "-n: 0 is below 1"),
        ({"temperature": -1.0}, "--temperature: -1.0 is not"),
        ({"temperature": float("nan")}, "--temperature: nan is not"),
        ({"temperature": float("inf")}, "--temperature: inf is not"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p: 1.5 is not above 0, at most 1"),
        ({"top_k": 1.5}, "--top-k: 1.5 is not an integer"),
        ({"guidance": -0.5}, "--guidance: -0.5 is not at least 0"),
        ({"guidance": float("nan")}, "--guidance: nan is not a finite number"),
        ({"guidance": float("inf")}, "--guidance: inf is not a finite number"),
        ({"guidance": "3"}, "--guidance: '3' is not a number"),
        ({"guidance_schedule": "square"}, "--guidance-schedule: 'square' is not one of constant,"),
        ({"guidance_schedule": 1}, "--guidance-schedule: 1 is not one of constant"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": 2.5}, "--batch-size: 2.5 is not an integer"),
        ({"n": "3"}, "-n: '3' is not an integer"),
        ({"seed": 1.5}, "--seed: 1.5 is not an integer"),
        ({"temperature": "1"}, "--temperature: '1' is not a number"),
        ({"prompts": ["a", 3]}, "a prompt is not text: 3"),
        ({"prompts": "caf\udce9"}, r"a prompt is not text: 'caf\\udce9'; write it in UTF-8"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    options = {"prompts": "a red heart"} | options
    with pytest.raises(UserError, match=message):
        build().generate(options.pop("prompts"), **options)


def test_a_prompt_too_long_is_cut_with_a_warning():
    generator = build()
    with pytest.warns(UserWarning, match="cut to 6 tokens: a red heart, a blue car"):
        drawn = generator.generate("a red heart, a blue car")
    assert [image.prompt for image in drawn] == ["a red heart, a blue car"]


def names(folder, *but):
    return sorted(path.name for path in folder.iterdir() if path.name not in but)


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())["images"]


def test_outputs_are_pictures_a_grid_and_a_manifest(tmp_path):
    generator = build()
    drawn = generator.generate(["a red heart", "a blue car"], n=2, seed=3, top_k=5)
    out = tmp_path / "out"
    write_outputs(drawn, str(out))
    entries = manifest(out)
    files = [entry["file"] for entry in entries]
    assert names(out) == sorted([*files, "grid.png", "manifest.json"])
    starts = ["a-red-heart-00-", "a-red-heart-01-", "a-blue-car-00-", "a-blue-car-01-"]
    assert all(map(str.startswith, files, starts))
    assert entries[3] == {
        "file": files[3], "prompt": "a blue car", "index": 1, "seed": 3, "model": "f" * 16,
        "precision": "fp32", "temperature": 1.0, "top_k": 5, "top_p": 1.0, "guidance": 1.0,
        "guidance_schedule": "constant",
    }  # fmt: skip
    with Image.open(out / files[3]) as kept:
        assert kept.tobytes() == drawn[3].image.tobytes()


def test_the_manifest_says_how_to_draw_a_picture_again(tmp_path):
    generator = build()
    options = {"temperature": 0.5, "guidance": 2, "guidance_schedule": "linear"}
    drawn = generator.generate(["a blue car", "a red heart"], n=3, seed=7, **options)
    write_outputs(drawn, str(tmp_path))
    entry = manifest(tmp_path)[5]
    kept = ("seed", "temperature", "top_k", "top_p", "guidance", "guidance_schedule")
    options = {key: entry[key] for key in kept}
    again = generator.generate(entry["prompt"], n=entry["index"] + 1, **options)[-1]
    with Image.open(tmp_path / entry["file"]) as kept:
        assert kept.tobytes() == again.image.tobytes()


def test_a_repeated_call_replaces_its_own_pictures(tmp_path):
    generator = build()
    first = generator.generate("a red heart", n=2)
    write_outputs(first, str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a-red-heart-*.png")}
    write_outputs(generator.generate("a blue car"), str(tmp_path))
    write_outputs(first, str(tmp_path))
    assert len(names(tmp_path)) == 5 and len(before) == 2
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert [e["prompt"] for e in manifest(tmp_path)] == ["a red heart"] * 2 + ["a blue car"]


@pytest.mark.parametrize(
    ("prompt", "change", "fingerprint"),
    [
        ("a red heart!", {}, "old"),
        ("A red heart", {}, "old"),
        ("a red heart", {"seed": 1}, "old"),
        ("a red heart", {"temperature": 0.5}, "old"),
        ("a red heart", {"top_k": 3}, "old"),
        ("a red heart", {"top_p": 0.5}, "old"),
        ("a red heart", {"guidance": 2}, "old"),
        ("a red heart", {"guidance_schedule": "linear"}, "old"),
        ("a red heart", {}, "new"),
    ],
)
def test_what_differs_in_anything_lies_beside_the_earlier_pictures(
    tmp_path, prompt, change, fingerprint
):
    generator = build()
    generator.fingerprint = "old"
    write_outputs(generator.generate("a red heart", n=2), str(tmp_path))
    earlier = {path: path.read_bytes() for path in tmp_path.glob("a-red-heart-*.png")}
    with Image.open(tmp_path / "grid.png") as grid:
        height, width = grid.height, grid.width
    generator.fingerprint = fingerprint
    write_outputs(generator.generate(prompt, **change), str(tmp_path))
    assert {path: path.read_bytes() for path in earlier} == earlier
    assert len(list(tmp_path.glob("a-red-heart-*.png"))) == 3
    assert [entry["prompt"] for entry in manifest(tmp_path)] == ["a red heart"] * 2 + [prompt]
    with Image.open(tmp_path / "grid.png") as grid:  # another seed's in the same row
        assert (grid.height > height, grid.width > width) == (
            (False, True) if "seed" in change else (True, False)
        )


@pytest.mark.parametrize(
    ("prompts", "starts"),
    [
        (("猫", "犬"), ("猫-00", "犬-00")),
        (("Привет, МИР", "हिन्दी में"), ("привет-мир-00", "हिन्दी-में-00")),
        (("école", "e\u0301cole!"), ("école-00", "école-00")),
        (("❤️", "😀/../🚀"), ("prompt-00", "prompt-00")),
        (("on and " * 40 + "red", "on and " * 40 + "blue"), ("on-and", "on-and")),
        (("猫" * 100 + "a", "猫" * 100 + "b"), ("猫" * 33 + "-00", "猫" * 33 + "-00")),
        (("../x", ".hidden"), ("x-00", "hidden-00")),
    ],
)
def test_names_keep_letters_of_any_script_and_fit_file_systems(tmp_path, prompts, starts):
    generator = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prompts are cut
        for prompt in prompts:
            write_outputs(generator.generate(prompt), str(tmp_path / "out"))
    files = [entry["file"] for entry in manifest(tmp_path / "out")]
    assert names(tmp_path) == ["out"] and len(set(files)) == 2
    assert sorted(files) == names(tmp_path / "out", "grid.png", "manifest.json")
    assert all(map(str.startswith, files, starts)), files
    assert all(len(name.encode()) <= 130 for name in files)


def test_a_file_system_without_unicode_gets_what_it_can_write(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs.sys, "getfilesystemencoding", lambda: "latin-1")
    drawn = [image for prompt in ("猫 cat é", "犬") for image in build().generate(prompt)]
    write_outputs(drawn, str(tmp_path))
    files = [entry["file"] for entry in manifest(tmp_path)]
    assert files[0].startswith("cat-é-00-") and files[1].startswith("prompt-00-")


def test_the_grid_shows_many_pictures_in_lines_and_names_what_tells_rows_apart():
    entries = {
        f"{i}": {"prompt": "a", "model": "m", "temperature": t, "top_k": 0, "top_p": 1.0}
        for i, t in enumerate([1.0] * 14 + [0.5])
    }
    with patch.object(outputs, "grid") as grid:
        outputs._grid(entries, dict.fromkeys(entries, build().generate("a")[0].image))
    (rows,), options = grid.call_args
    assert [len(row) for row in rows] == [12, 2, 1]
    assert options["captions"] == [["a (temperature 1.0)"], [""], ["a (temperature 0.5)"]]


def test_pictures_that_were_removed_or_made_by_an_earlier_version(tmp_path):
    generator = build()
    write_outputs(generator.generate("a red heart", n=2), str(tmp_path))
    first, second = manifest(tmp_path)
    (tmp_path / first["file"]).unlink()
    old = {"file": second["file"], "prompt": "a red heart", "seed": 5, "model": "x"}
    (tmp_path / "manifest.json").write_text(json.dumps({"images": [first, old]}))
    write_outputs(generator.generate("a blue car"), str(tmp_path))
    entries = manifest(tmp_path)
    assert entries[0] == old and [e["prompt"] for e in entries] == ["a red heart", "a blue car"]


def test_a_damaged_earlier_picture_is_named_before_anything_is_written(tmp_path):
    generator = build()
    write_outputs(generator.generate("a red heart"), str(tmp_path))
    (file,) = [entry["file"] for entry in manifest(tmp_path)]
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:60])
    before = names(tmp_path)
    with pytest.raises(UserError, match=f"{file}: is not a whole image; remove it"):
        write_outputs(generator.generate("a blue car"), str(tmp_path))
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", "mine"),
        ("manifest.json", '{"step": 3, "world": 1, "files": {"weights": 5}}'),
        ("manifest.json", "[]"),
        ("manifest.json", "not JSON"),
        ("grid.png", "a holiday"),
        ("00-a-red-heart-00.png", "a holiday"),
    ],
)
def test_a_foreign_folder_is_not_written_to(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    drawn = build().generate("a red heart")
    with pytest.raises(UserError, match=f"holds {name}, which is not a generated image"):
        write_outputs(drawn, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_file_beside_own_pictures_is_foreign(tmp_path):
    drawn = build().generate("a red heart")
    write_outputs(drawn, str(tmp_path))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes/a\.txt"):
        write_outputs(drawn, str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_BT": text()[:, :5]}, r"text: shape \(3, 5\) is not \[B, 6\]"),
        ({"text_BT": text() + 300}, r"text: values from \d+ to \d+ are not in 0 to 299"),
        ({"seeds": [1, 2]}, "seeds: 2 for 3 rows of text"),
        ({"kept_codes": torch.zeros(3, 17).long()}, r"\(3, 17\) is not \(3, 16\)"),
        ({"kept_codes": torch.zeros(2, 16).long()}, r"\(2, 16\) is not \(3, 16\)"),
        ({"kept_codes": torch.zeros(3, 16)}, r"kept_codes: dtype torch\.float32 is not int64"),
        # One past the codebook is the start of the image, which the embedding would take.
        ({"kept_codes": torch.full((3, 16), 20)}, "from 20 to 20 are not in 0 to 19"),
        ({"kept_codes": torch.full((3, 16), -2)}, "from -2 to -2 are not in 0 to 19"),
    ],
)
def test_the_sampler_refuses_tensors_that_do_not_fit(options, message):
    options = {"text_BT": text(), "seeds": [1, 2, 3]} | options
    with pytest.raises(ValueError, match=message):
        sample_codes(build().model, **options)
