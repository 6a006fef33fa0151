"""Package metadata. Versions are pinned in constraints.txt, tool settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).parent / "dalle_dist" / "__init__.py"
# It lies beside the package in the repository, and inside it in a wheel.
DATA = {"dalle_dist.slurm": "slurm"}

setup(
    name="dalle-dist",
    # Read, not imported: the version is stated once, and setting up needs nothing of the package.
    version=re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1],
    description="Train DALL-E from a laptop's CPU to a cluster, with the same commands",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["dalle_dist", "dalle_dist.*"]), *DATA],
    package_dir=DATA,
    package_data={
        "dalle_dist": ["constraints.txt", "py.typed"],
        "dalle_dist.plan": ["*.yaml"],
        "dalle_dist.presets": ["*.yaml"],
        "dalle_dist.serve": ["page/*"],
        "dalle_dist.slurm": ["*.sbatch", "*.sh"],
    },
    install_requires=[
        "torch>=2.7",
        "deepspeed>=0.17.5,<=0.19.8,!=0.17.6,!=0.18.0,!=0.18.1,!=0.18.2,!=0.18.3",
        "dalle-kernels",
        "boto3",
        "emoji",
        "fsspec",
        "matplotlib",
        "mpi4py",
        "numpy",
        "pillow",
        "pyarrow",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "webdataset",
        "xxhash",
    ],
    extras_require={
        "test": [
            "attrs",
            "axial-positional-embedding",
            "codespell",
            "einops",
            "hypothesis",
            "moto[s3,server]",
            "mypy",
            "openmpi",
            "py3langid",
            "pytest",
            "pytest-xdist",
            "regex",
            "rotary-embedding-torch",
            "ruff",
            "scipy",
            "selenium",
            "starlette",
            "types-PyYAML",
            "types-tqdm",
            "uvicorn",
        ],
        "gpu": ["triton"],
        "filters": ["py3langid"],
        "clip": ["transformers>=5.23"],
        "serve": ["starlette", "uvicorn"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["dalle-dist = dalle_dist.cli:program"]},
)
