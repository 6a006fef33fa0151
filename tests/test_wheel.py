"""Installed from wheels into an empty environment, every stage runs in a folder of the user's own.

The checkout is not there to help: its source is copied first, and its folder is on no path.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import yaml
from PIL import Image, ImageStat

ROOT = Path(__file__).parents[1]
PIP = ["-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
# Folders of the repository, and where their files lie beside the installed package.
SHIPPED = {
    "dalle_dist": "dalle_dist",
    "slurm": "dalle_dist/slurm",
    "kernels/dalle_kernels": "dalle_kernels",
}
SUFFIXES = (".css", ".html", ".js", ".json", ".py", ".sbatch", ".sh", ".txt", ".typed", ".yaml")
STAGES = [
    ["data", "build", "images", "data"],
    ["data", "inspect", "data", "--contact-sheet", "sheet.png"],
    ["tokenizer", "train", "tiny.yaml"],
    ["train-dvae", "tiny.yaml"],
    ["encode", "tiny.yaml"],
    ["train", "tiny.yaml"],
    ["generate", "runs/tiny/release", "a red heart", "-n", "2"],
    ["report", "tiny.yaml"],
    ["convert", "runs/tiny", "converted"],
    ["slurm"],
]


def environment(venv):
    """Ours without what could lead to the checkout, and with the virtual environment in front."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{venv}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def run(venv, folder, program, *arguments):
    done = subprocess.run(
        [venv / "bin" / program, *arguments], cwd=folder, env=environment(venv),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{program} {arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """An empty environment with the two wheels; building them would litter the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv = folder / "source", folder / "venv"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if not (ROOT / name).is_file():
            continue  # deleted, and not yet committed
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    run(venv, source, "python", *PIP, "setuptools", "wheel", "torch")
    run(venv, source, "python", *PIP, "--no-build-isolation", "kernels/", ".")
    shutil.rmtree(source)
    return venv


@pytest.fixture
def elsewhere(tmp_path):
    """A user's folder: images with captions, and a config of a few updates."""
    (tmp_path / "images").mkdir()
    for i, caption in enumerate(tiny_run.CAPTIONS):
        Image.new("RGB", (16, 16), (i * 4, 128, 255 - i * 4)).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text(caption)
    tree = yaml.safe_load(tiny_run.CONFIG)
    tree["dvae_train"] = {"batch_size": 8, "steps": 4, "eval_every": 4, "precision": "fp32"}
    tree["paths"] = {
        "images": "data", "tokens": "tokens", "tokenizer": "tokenizer.json",
        "dvae_run": "runs/tiny-dvae", "run": "runs/tiny",
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


@pytest.mark.slow
def test_the_wheels_hold_every_file_and_draw(venv, elsewhere):
    program = "import dalle_dist, dalle_kernels as k; print(dalle_dist.__file__, k.__file__)"
    places = [Path(p) for p in run(venv, elsewhere, "python", "-c", program).split()]
    assert all(place.is_relative_to(venv) for place in places)
    for folder, target in SHIPPED.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
        assert files
        for file in files:
            installed = places[0].parents[1] / target / file.relative_to(ROOT / folder)
            assert installed.read_bytes() == file.read_bytes()
    for package in ("dalle_dist", "dalle_kernels"):
        (licence,) = places[0].parents[1].glob(f"{package}-*.dist-info/licenses/LICENSE")
        assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert run(venv, elsewhere, "dalle-dist", "--version").startswith("dalle-dist ")
    for arguments in STAGES:
        run(venv, elsewhere, "dalle-dist", *arguments)
    for name in ("sheet.png", "generated/grid.png", "runs/tiny/report.png"):
        image = Image.open(elsewhere / name).convert("L")
        assert image.width >= 16 and ImageStat.Stat(image).stddev[0] > 1, name
    assert (elsewhere / "converted/transformer.safetensors").is_file()
    assert (elsewhere / "slurm/train.sbatch").is_file()
