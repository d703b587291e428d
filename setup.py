"""Packaging of megatrain; exact versions stand in requirements.lock."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

# the version stands in the package; to import it would take what is not installed yet
TREE = ast.parse((Path(__file__).parent / "megatrain" / "__init__.py").read_text(encoding="utf-8"))
VERSION = next(ast.literal_eval(node.value) for node in TREE.body if isinstance(node, ast.Assign))

setup(
    name="megatrain",
    version=VERSION,
    description="A pretraining stack for the Transformer family: any layout, same numbers.",
    license="Apache-2.0",
    packages=find_packages(include=["megatrain", "megatrain.*"]),
    package_data={"megatrain": ["py.typed"]},
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
            "codespell>=2.4",
            "coverage>=7.10",
            "types-PyYAML",
            "tensorstore>=0.1.70",
        ],
    },
)
