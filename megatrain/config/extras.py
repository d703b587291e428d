"""The packages that only parts of the stack need, and how to get one that is missing."""

# package as pip calls it -> the extra of setup.py that brings it
EXTRA_OF = {
    "gigatoken": "data",
    "orjson": "data",
    "sentencepiece": "data",
    "pyarrow": "data",
    "zstandard": "data",
    "datasketch": "data",
    "pillow": "data",
    "mpi4py": "mpi",
    "safetensors": "convert",
    "transformers": "convert",
}


def missing(package: str, use: str, error: ImportError) -> str:
    """What to say where ``use`` needs ``package``, whose import ended with ``error``."""
    extra = EXTRA_OF[package]
    return (
        f"{use} needs the package {package} ({error}): pip install {package}, or, in megatrain's checkout, "
        f'pip install -e ".[{extra}]"'
    )
