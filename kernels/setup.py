"""`dalle_kernels`: DALL-E's attention masks and the kernels that exploit them."""

from setuptools import setup

setup(
    name="dalle-kernels",
    version="0.1.0",
    description="DALL-E's sparse attention masks and kernels; knows nothing of dalle_dist",
    license="Apache-2.0",
    license_files=["LICENSE"],  # a copy: a wheel cannot take files from above its setup.py
    python_requires=">=3.10",
    packages=[
        "dalle_kernels",
        "dalle_kernels.adamw",
        "dalle_kernels.generation",
        "dalle_kernels.minifloat",
        "dalle_kernels.scaled_gradients",
        "dalle_kernels.sparse_attention",
    ],
    package_data={"dalle_kernels": ["py.typed"]},
    install_requires=["torch>=2.7"],
    extras_require={"gpu": ["triton"]},
)
