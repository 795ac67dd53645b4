from pathlib import Path

from setuptools import find_packages, setup

# One version of torch, the referee, because plain "torch" fetches gigabytes of CUDA libraries on some platforms; one of
# ruff, because what it formats and how changes between versions.
TEST = [
    "pytest>=8",
    "ruff==0.17.6",
    "torch==2.13.0",
    "diffusers==0.42.1",
    "hypothesis>=6",
]
NOTEBOOKS = ["jupytext>=1.16", "nbformat>=5.10"]

setup(
    name="sd_jax",
    version="0.1.0",
    description="Stable Diffusion v1-4 in JAX/Flax for TPUs and GPUs: numerically the reference, open to experiments",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["sd_jax", "sd_jax.*"]),
    package_data={"sd_jax": ["tiny/**/*"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.5",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12,<1",
        "transformers>=5,<6",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "huggingface_hub>=1",
        "ml_dtypes>=0.5",
        "numpy>=2.1",
        "pillow>=11",
        "einops>=0.8",
    ],
    extras_require={
        "cuda13": ["jax[cuda13]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "train": ["grain>=0.2.12"],
        "notebooks": NOTEBOOKS + ["matplotlib>=3.9"],
        "test": TEST + NOTEBOOKS,
    },
    entry_points={"console_scripts": ["sd-jax = sd_jax.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
