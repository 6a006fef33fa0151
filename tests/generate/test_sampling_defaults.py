"""The sampling options of a release are those of its config, unless a call says otherwise."""

import inspect
import json

import pytest
from tiny_generator import build

from dalle_dist import Generator
from dalle_dist.cli import main
from dalle_dist.config import SamplingConfig
from dalle_dist.config.root import keys_of
from dalle_dist.generate.sampling_options import Sampling, SamplingOptions, flag
from dalle_dist.report.samples import generate_samples

OPTIONS = {"guidance": 3.0, "temperature": 0.5}
NAMES = [name for name, *_ in keys_of(SamplingConfig)]


def codes(release, **options):
    made = Generator.load(release, device="cpu").generate("red heart", n=4, **options)
    return [image.codes_N.tolist() for image in made]


def test_a_release_generates_by_its_own_options_and_a_call_may_say_otherwise(release):
    set_, plain = release(**OPTIONS), release()
    assert codes(set_) == codes(plain, **OPTIONS) != codes(plain)
    assert codes(set_, guidance=1, temperature=1) == codes(plain)
    assert codes(set_, temperature=0) == codes(plain, guidance=3, temperature=0)


def test_the_command_line_takes_the_releases_options_too(release, tmp_path):
    set_ = release(guidance_schedule="linear", top_k=7, **OPTIONS)

    def in_force(*flags):
        out = tmp_path / "-".join(("out", *flags))
        assert main(["generate", set_, "red heart", "-o", str(out), *flags]) == 0
        (entry,) = json.loads((out / "manifest.json").read_text())["images"]
        return {name: entry[name] for name in NAMES}

    defaults = {"top_p": 1.0, "top_k": 7, "guidance_schedule": "linear", **OPTIONS}
    assert in_force() == defaults
    # 0 and 1 are given, not absent.
    flags = ("--top-k", "0", "--guidance", "1", "--guidance-schedule", "cosine")
    assert in_force(*flags) == defaults | {
        "top_k": 0, "guidance": 1.0, "guidance_schedule": "cosine",
    }  # fmt: skip


def test_help_says_whose_defaults_are_meant(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(flag(name) in shown for name in NAMES)
    assert shown.count("(default: the release's)") == len(NAMES)
    assert "--guidance-schedule {constant,linear,cosine}" in shown


def test_every_option_of_the_config_is_an_argument_of_generate():
    assert sorted(SamplingOptions.__annotations__) == sorted(NAMES)
    for method in (Generator.generate, Generator.complete, Generator.settings):
        taken = inspect.signature(method).parameters["sampling"]
        assert taken.annotation == "Unpack[SamplingOptions]"
    assert Sampling.of(SamplingConfig(top_k=3), top_k=None, top_p=0.5) == Sampling(
        top_k=3, top_p=0.5
    )


def test_the_report_samples_by_the_releases_options():
    for temperature, different in ((1, 4), (0, 1)):
        generator = build(f"sampling.temperature={temperature}")
        (images,) = generate_samples(generator, ["a red heart"], seed=0)
        assert len({image.tobytes() for image in images}) == different
