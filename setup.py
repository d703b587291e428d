"""Packaging of megatrain; exact versions stand in requirements.lock."""

from setuptools import find_packages, setup

setup(
    name="megatrain",
    version="0.1.0",
    description="A pretraining stack for the Transformer family: any layout, same numbers.",
    license="Apache-2.0",
    packages=find_packages(include=["megatrain", "megatrain.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the last for Python 3.11,
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "numpy>=2",
        "zarr>=3.1,<4",
        "awscrt>=0.38",  # CRC-32C: at twice google-crc32c's speed, and other threads go on meanwhile
        "tokenizers>=0.20",
        "tqdm>=4.66",
        "tensorboard>=2.17",
    ],
    extras_require={
        "plan": ["pillow>=10"],
        "mpi": ["mpi4py>=4"],
        "data": [
            "gigatoken>=0.10",
            "orjson>=3.10",
            "sentencepiece>=0.2",
            "pyarrow>=18",
            "zstandard>=0.23",
            "datasketch>=1.6",
            "pillow>=10",
        ],
        "convert": ["safetensors>=0.4", "transformers>=4.51"],
        "dev": [
            "psutil>=5.9",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
            "tensorstore>=0.1.70",
        ],
    },
)
