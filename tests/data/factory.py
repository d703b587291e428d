"""Small data sets and tokenizers for tests."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatrain.data.shards.reader import TokenDataset
from megatrain.data.shards.writer import DatasetWriter

EOD_ID = 0


def random_documents(num_tokens: int, vocab_size: int, seed: int) -> list[np.ndarray]:
    """Documents of 1 to 100 tokens, ``num_tokens`` in all, each ended by token 0."""
    random = np.random.default_rng(seed)
    documents = []
    while num_tokens:
        length = min(num_tokens, int(random.integers(1, 101)))
        documents.append(np.append(random.integers(1, vocab_size, length - 1), EOD_ID))
        num_tokens -= length
    return documents


def write_documents(folder: Path, documents: list[np.ndarray], vocab_size: int, shard_tokens: int = 1000) -> Path:
    """A data set of these documents, with the tokenizer of ``byte_tokenizer``."""
    options = {"vocab_size": vocab_size, "eod_id": EOD_ID, "shard_tokens": shard_tokens}
    with DatasetWriter(folder, tokenizer=byte_tokenizer(), tokenizer_name="bytes", **options) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    return folder


def make_dataset(folder: Path, num_tokens: int = 10_000, vocab_size: int = 300, seed: int = 0) -> Path:
    """A data set of ``random_documents`` in several shards; returns ``folder``."""
    return write_documents(folder, random_documents(num_tokens, vocab_size, seed), vocab_size)


def open_dataset(folder: Path, num_tokens: int = 10_000, vocab_size: int = 300, seed: int = 0) -> TokenDataset:
    """Makes and opens."""
    return TokenDataset.open(make_dataset(folder, num_tokens, vocab_size, seed))


def byte_tokenizer() -> bytes:
    """A tokenizer.json of 257 tokens: the end of document (0) and the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0, **{c: i for i, c in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str().encode()
