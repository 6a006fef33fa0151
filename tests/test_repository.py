"""What holds for the files beside the code: hooks, hosted CI, pages, licence, sizes."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import links
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LARGEST = 500 * 1024  # bytes
APACHE_2 = "3b83ef96387f14655fc854ddc3c6bd57"  # MD5 of the text that the foundation publishes
HOOKS = {"ruff-check", "ruff-format", "codespell", "check-added-large-files", "links"}
HOOKS |= {"end-of-file-fixer", "trailing-whitespace"}


def tracked():
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def hooks():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return {hook["id"]: (repo, hook) for repo in repos for hook in repo["hooks"]}


def pinned(package):
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_hooks_are_the_promised_ones_each_at_a_version():
    assert set(hooks()) == HOOKS
    for repo, _ in hooks().values():
        assert repo["repo"] == "local" or re.fullmatch(r"v\d+\.\d+\.\d+", repo["rev"])
    assert hooks()["ruff-check"][0]["rev"] == f"v{pinned('ruff')}"


def test_the_hook_for_large_files_has_the_limit_of_this_test():
    _, hook = hooks()["check-added-large-files"]
    assert hook["args"] == [f"--maxkb={LARGEST // 1024}"] and "exclude" not in hook


def test_our_own_hooks_are_commands_that_run():
    own = [hook for repo, hook in hooks().values() if repo["repo"] == "local"]
    assert own
    for hook in own:
        program, *arguments = hook["entry"].split()
        assert program == "python3"
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_hosted_ci_is_ci_run_and_needs_no_secret():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert job["runs-on"].startswith("ubuntu-")
    commands = [step["run"] for step in job["steps"] if "run" in step]
    *setup, last = commands
    assert all(command.startswith("sudo apt-get ") for command in setup)
    assert last.endswith(" .ci/run") and os.access(ROOT / ".ci/run", os.X_OK)
    (python,) = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert python["with"]["python-version"] == "3.11"
    assert "secrets." not in text


@pytest.mark.parametrize("page", links.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_in_pages_lead_somewhere(page):
    assert not links.broken(page)


def test_a_link_and_a_path_that_lead_nowhere_are_told(tmp_path):
    (tmp_path / "dalle_dist/data").mkdir(parents=True)
    for name in ("here.md", "dalle_dist/data/order.py"):
        (tmp_path / name).touch()
    page = tmp_path / "README.md"
    page.write_text(
        "[a](here.md#part) [b](gone.md) [c](https://example.org/x) [d](#part) ![e](gone.png)\n"
        "`data/order.py` `dalle_dist/data/` `data/mine` `runs/demo/release` `RUN/x` `1/8` `s3://b`\n"
        "```\n`fenced/gone.py`\n```\n"
        "`python -m x dalle_dist/gone.py` `data/gone.py` `dalle_dist/*/order.py` `broken over\n"
        "two/lines.py`\n"
    )
    assert links.broken(page, tmp_path) == [
        "README.md:1: gone.md",
        "README.md:1: gone.png",
        "README.md:6: dalle_dist/gone.py",
        "README.md:6: data/gone.py",
        "README.md:6: two/lines.py",
    ]


def test_no_file_is_large():
    assert not {name for name in tracked() if (ROOT / name).stat().st_size > LARGEST}


def test_text_ends_with_one_newline_and_no_line_with_a_blank():
    """What the hooks would change, so that a commit without them does not."""
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if not data or b"\0" in data:
            continue
        assert data.endswith(b"\n") and not data.endswith(b"\n\n"), name
        assert not re.search(rb"[ \t]+\r?\n", data), name


def test_both_packages_carry_the_unmodified_licence_and_their_types():
    for folder, package in ((".", "dalle_dist"), ("kernels", "dalle_kernels")):
        text = (ROOT / folder / "LICENSE").read_bytes()
        assert hashlib.md5(text, usedforsecurity=False).hexdigest() == APACHE_2
        assert 'license="Apache-2.0"' in (ROOT / folder / "setup.py").read_text()
        assert (ROOT / folder / package / "py.typed").is_file()


def test_words_are_spelled_as_codespell_knows_them():
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *tracked()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_glossary_is_in_alphabetical_order():
    rows = (ROOT / "CONTRIBUTING.md").read_text().partition("## Glossary")[2].split("\n| ")[2:]
    terms = [row.partition(" |")[0] for row in rows]
    words = [term for term in terms if term[0].isalpha()]
    assert len(words) > 50
    assert words == sorted(words, key=str.casefold)


def test_a_newer_environment_does_not_make_the_demo_anew(tmp_path):
    """What a run has made stays, whatever `git pull` did to the environment since."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = ["setup.py", "kernels/setup.py", "constraints.txt", "data/emoji/held-out/index.json",
            "data/emoji/tokenizer.json", "runs/demo-dvae/release/config.yaml",
            "data/emoji-tokens/held-out/index.json", "runs/demo/release/config.yaml",
            "runs/demo-clip/release/config.yaml", "runs/demo-judge/release/config.yaml",
            "runs/demo/report.html", "runs/demo/evaluation/report.html",
            ".venv/ready"]  # fmt: skip
    for age, name in enumerate(reversed(made)):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    dry = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert "dalle-dist" not in dry.stdout and "deepspeed" not in dry.stdout
