"""Damage is found at the first touch of a block, and nothing of it is served."""

import numpy as np
import pytest

from megatrain.data.errors import DataError
from megatrain.data.shards.format import BLOCK_SIZE
from megatrain.data.shards.reader import TokenDataset
from tests.data.factory import write_documents

PER_BLOCK = BLOCK_SIZE // 2  # tokens


@pytest.fixture
def folder(tmp_path):
    documents = [np.arange(PER_BLOCK) % 60_000 for _ in range(4)]
    return write_documents(tmp_path / "set", documents, 60_000, shard_tokens=10**9)


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_is_found_when_its_block_is_touched(folder):
    """Defect 4: Megatron serves flipped bits."""
    flip(folder / "tokens-00000.bin", BLOCK_SIZE + 7)
    dataset = TokenDataset.open(folder)
    assert dataset.tokens(PER_BLOCK - 9, 9).tolist() == ((np.arange(9) + PER_BLOCK - 9) % 60_000).tolist()
    for start, count in ((PER_BLOCK - 1, 2), (2 * PER_BLOCK - 1, 1), (0, 4 * PER_BLOCK)):
        with pytest.raises(DataError, match=r"tokens-00000.bin is damaged in block 1 \(bytes 1048576 to 2097152\)"):
            dataset.tokens(start, count)
    dataset.tokens(2 * PER_BLOCK, 5)


def test_a_block_is_checked_once(folder):
    dataset = TokenDataset.open(folder)
    dataset.tokens(0, 4 * PER_BLOCK)
    (folder / "tokens-00000.crc").unlink()
    dataset.tokens(5, 4)
    with pytest.raises(DataError, match=r"missing file of the data set: .*crc"):
        TokenDataset.open(folder)


@pytest.mark.parametrize("at", [8, 16, 20])
def test_damaged_crcs_are_found(folder, at):
    flip(folder / "tokens-00000.crc", at)
    with pytest.raises(DataError, match=r"damaged in block|holds \d CRCs of"):
        TokenDataset.open(folder).tokens(0, 4 * PER_BLOCK)


def test_a_file_that_is_cut_while_it_is_read(folder):
    dataset = TokenDataset.open(folder)
    dataset.tokens(0, 4 * PER_BLOCK)
    with open(folder / "tokens-00000.bin", "r+b") as file:
        file.truncate(BLOCK_SIZE)
    with pytest.raises(DataError, match=r"ends at byte 1048576, expected 4194304 bytes"):
        dataset.tokens(PER_BLOCK - 1, 5)


def test_a_damaged_index_is_found_where_it_is_used(folder):
    flip(folder / "tokens-00000.idx", 40)
    with pytest.raises(DataError, match=r"idx is damaged: SHA-256"):
        TokenDataset.open(folder).document(0)


def test_reads_run_over_shards_and_over_the_end(tmp_path):
    documents = [np.arange(7) + 10 * i for i in range(1, 9)]
    dataset = TokenDataset.open(write_documents(tmp_path / "set", documents, 300, shard_tokens=14))
    assert len(dataset.manifest.shards) == 4
    ring = np.concatenate(documents * 5)
    starts = np.array([0, 13, 50, 55])
    rows = np.empty((4, 100), np.uint16)
    dataset.read(starts, rows)
    for row, start in zip(rows, starts, strict=True):
        assert np.array_equal(row, ring[start : start + 100])
