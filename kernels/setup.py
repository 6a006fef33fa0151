"""`dalle_kernels`: DALL-E's attention masks and the kernels that exploit them."""

from setuptools import setup

setup(
    name="dalle-kernels",
    version="0.1.0",
    description="DALL-E's sparse attention masks and kernels; knows nothing of dalle_dist",
    python_requires=">=3.10",
    packages=[
        "dalle_kernels",
        "dalle_kernels.adamw",
        "dalle_kernels.minifloat",
        "dalle_kernels.sparse_attention",
    ],
    install_requires=["torch>=2.7"],
    extras_require={"gpu": ["triton"]},
)
