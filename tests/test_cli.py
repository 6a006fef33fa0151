import os
import subprocess
import sys
from importlib import metadata

import pytest

import dalle_dist
from dalle_dist.cli import main

VERBS = [
    ["data", "emoji"],
    ["data", "build"],
    ["data", "inspect"],
    ["tokenizer", "train"],
    ["train-dvae"],
    ["encode"],
    ["train"],
    ["doctor"],
    ["generate"],
    ["serve"],
    ["evaluate"],
    ["overlap"],
    ["convert"],
    ["report"],
    ["config"],
    ["slurm"],
    ["submit"],
    ["progress"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*verb, "--help"])
    assert exit_.value.code == 0
    assert "usage: dalle-dist" in capsys.readouterr().out


def test_version_is_told_without_importing_torch():
    program = (
        "import sys\n"
        "from dalle_dist.cli import main\n"
        "try:\n    main(['--version'])\n"
        "except SystemExit as exit_:\n    assert exit_.code == 0\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [metadata.version(name) for name in ("dalle-dist", "torch", "deepspeed")]
    assert done.stdout == "dalle-dist {} (torch {}, deepspeed {})\n".format(*found)
    assert found[0] == dalle_dist.__version__


def test_config_prints_what_a_command_would_use(capsys):
    assert main(["config", "emoji", "train.steps=7"]) == 0
    assert "steps: 7" in capsys.readouterr().out


def test_config_explains_a_key_or_a_section_without_a_preset(capsys):
    assert main(["config", "--explain", "train.warmup"]) == 0
    text = capsys.readouterr().out
    for part in ("train.warmup\n", "integer", "5000", "steps", "at least 0", "paper B.2"):
        assert part in text
    assert main(["config", "--explain", "parallel"]) == 0
    text = capsys.readouterr().out
    assert "parallel.between_nodes" in text and "zero, dense, powersgd" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--explain", "train.warmpu"], "did you mean 'train.warmup'?"),
        (
            ["--explain", "warmup"],
            "did you mean dvae_train.warmup or train.warmup or clip_train.warmup?",
        ),
        (["--explain", "trian"], "did you mean 'train'?"),
        ([], "give a PRESET, or --explain KEY"),
        (["emoji", "--explain", "seed"], "give a PRESET, or --explain KEY"),
    ],
)
def test_what_config_cannot_explain_is_said_in_one_line(words, message, capsys):
    assert main(["config", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_overrides_may_follow_flags(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "emoji", "--resume", "auto", "train.steps=none"]) == 2
    assert "train.steps: 'none' is not an integer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "no-such-preset"],
        ["train", "emoji", "train.typo=1"],
        ["train-dvae", "emoji", "dvae.image_size=70"],
        ["encode", "emoji"],
        ["tokenizer", "train", "emoji"],
        ["report", "emoji"],
        ["generate", "no/release", "a red heart"],
        ["convert", "no/checkpoint", "out"],
        ["overlap", "no/shards", "no/shards", "--clip", "no/clip"],
        ["data", "inspect", "no/shards"],
        ["data", "build", "no/folder", "out"],
    ],
    ids=" ".join,
)
def test_what_a_user_gets_wrong_is_one_line_and_nothing_is_written(
    arguments, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dalle-dist: error: ")
    assert list(tmp_path.iterdir()) == []


def test_stray_words_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "emoji", "--resume", "auto", "stray"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: stray" in capsys.readouterr().err


def test_config_errors_are_told_once_per_job(tmp_path):
    """Under a launcher, a thousand ranks must not print the same line a thousand times."""
    command = [sys.executable, "-m", "dalle_dist", "config", "emoji", "train.typo=1"]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for rank, expected in (("0", 1), ("1", 0)):
        environ = os.environ | job | {"RANK": rank, "LOCAL_RANK": rank}
        result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == expected


def test_a_config_may_lie_on_a_remote_store(bucket, capsys):
    from dalle_dist import storage

    storage.write_bytes(f"{bucket}/mine.yaml", b"base: emoji\nname: mine\n")
    assert main(["config", f"{bucket}/mine.yaml", "train.steps=7", "train.warmup=1"]) == 0
    out = capsys.readouterr().out
    assert "name: mine" in out and "steps: 7" in out
    assert main(["config", f"{bucket}/absent.yaml"]) == 2
    assert "absent.yaml: no such object" in capsys.readouterr().err
