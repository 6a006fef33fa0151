"""Package metadata. Versions are pinned in constraints.txt, tool settings in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="dalle-dist",
    version="0.1.0",
    description="Train DALL-E from a laptop's CPU to a cluster, with the same commands",
    python_requires=">=3.10",
    packages=find_packages(include=["dalle_dist", "dalle_dist.*"]),
    package_data={"dalle_dist.presets": ["*.yaml"]},
    install_requires=[
        "torch>=2.7",
        "deepspeed>=0.17.5,!=0.17.6,!=0.18.0,!=0.18.1,!=0.18.2,!=0.18.3",
        "dalle-kernels",
        "boto3",
        "emoji",
        "matplotlib",
        "mpi4py",
        "numpy",
        "pillow",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "webdataset",
    ],
    extras_require={
        "test": [
            "moto[s3,server]",
            "mypy",
            "openmpi",
            "pytest",
            "ruff",
            "types-PyYAML",
            "types-tqdm",
        ],
        "gpu": ["triton"],
        "clip": ["transformers"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["dalle-dist = dalle_dist.cli:main"]},
)
