"""Data sets that are read together must mean the same by a token."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatrain.data.errors import DataError
from megatrain.data.shards.reader import TokenDataset


def require_one_tokenizer(datasets: Iterable[TokenDataset], tokenizer: str | None) -> None:
    """Compares the tokenizers that the data sets were written with, where they say so.

    Args:
        tokenizer: path of the tokenizer.json that the run names itself; None: none.
    Raises:
        DataError: they are not the same, or differ in the end-of-document token.
    """
    wanted, whose = None, ""
    if tokenizer is not None:
        try:
            wanted, whose = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest(), f"data.tokenizer = {tokenizer}"
        except OSError as error:
            raise DataError(f"cannot read data.tokenizer = {tokenizer}: {error.strerror}") from error
    first: TokenDataset | None = None
    for dataset in datasets:
        if dataset.manifest is None:
            continue
        if wanted is None:
            wanted, whose = dataset.manifest.tokenizer_sha256, str(dataset.folder)
        if dataset.manifest.tokenizer_sha256 != wanted:
            raise DataError(
                f"{dataset.folder} was written with another tokenizer ({dataset.manifest.tokenizer}) than {whose}: "
                "their token ids mean different texts. Tokenize one of them anew"
            )
        first = first or dataset
        if dataset.eod_id != first.eod_id:
            raise DataError(
                f"{dataset.folder} ends documents with token {dataset.eod_id}, {first.folder} with {first.eod_id}: "
                "tokenize one of them anew"
            )
