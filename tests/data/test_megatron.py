"""megatron-core reads our shards, and we read those of its builder. (Importing it takes seconds: inside only.)"""

import numpy as np
import pytest
import torch

from megatrain.data.shards.reader import TokenDataset
from tests.data.factory import random_documents, write_documents


@pytest.mark.parametrize("vocab_size", [300, 65_500, 65_536, 65_537])
def test_megatron_reads_ours(tmp_path, vocab_size):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [*random_documents(3000, vocab_size, 3), np.array([vocab_size - 1, 0])]
    folder = write_documents(tmp_path / "set", documents, vocab_size, shard_tokens=10**6)
    theirs = IndexedDataset(str(folder / "tokens-00000"))
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    for number, document in enumerate(documents):
        assert np.array_equal(theirs[number], document)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatron(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [random_documents(size, 60_000, size) for size in (700, 50, 300)]
    for name, part in zip(("b", "a"), (documents[:2], documents[2:]), strict=True):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for sequences in part:  # a document of several sequences each
            for sequence in sequences:
                builder.add_item(torch.from_numpy(sequence))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    with pytest.warns(UserWarning, match=r"has no manifest.json: read as Megatron shards a, b"):
        ours = TokenDataset.open(tmp_path)
    expected = [np.concatenate(documents[number]) for number in (2, 0, 1)]
    assert ours.num_documents == 3
    assert (ours.vocab_size, ours.eod_id, ours.tokenizer_path) == (None, None, None)
    for number, document in enumerate(expected):
        assert np.array_equal(ours.document(number), document)
    assert np.array_equal(ours.tokens(0, ours.num_tokens), np.concatenate(expected))
    assert len(ours.digest) == 64
