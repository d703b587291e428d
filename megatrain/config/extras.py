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


_PACKAGE_OF = {"PIL": "pillow"}
"""Module -> package, where their names differ."""


def missing_extra(use: str, error: ImportError) -> str | None:
    """What to say where ``use`` ended with ``error``; None where no extra brings what is missing."""
    module = (error.name or "").partition(".")[0]
    package = _PACKAGE_OF.get(module, module)
    return missing(package, use, error) if package in EXTRA_OF else None


def missing(package: str, use: str, error: ImportError) -> str:
    """What to say where ``use`` needs ``package``, whose import ended with ``error``."""
    extra = EXTRA_OF[package]
    return (
        f"{use} needs the package {package} ({error}): pip install {package}, or, in megatrain's checkout, "
        f'pip install -e ".[{extra}]"'
    )
