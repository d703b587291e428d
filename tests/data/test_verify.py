"""verify_shards sees every change of a data set; merge, import and inspect."""

import hashlib
import shutil
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_tools import import_megatron, inspect_shards, merge_shards, verify_shards
from megatrain.data.corpus import length_chart
from megatrain.data.pool import Pool
from megatrain.data.shards.manifest import MANIFEST, Manifest
from megatrain.data.shards.reader import TokenDataset
from megatrain.data.shards.verify import find_problems
from megatrain.data.shards.writer import DatasetWriter
from tests.data.factory import byte_tokenizer, make_dataset, random_documents, write_documents
from tests.data.mutations import mutated_copies

POOL = Pool(None, 1)
NUM_MUTATIONS = 400


def run(tool, *words):
    return tool.main([str(word) for word in words])


def test_every_mutation_is_seen(tmp_path):
    original = make_dataset(tmp_path / "set", num_tokens=3000)
    assert list(find_problems(original, POOL)) == []
    unseen, files = [], set()
    for copy, change in mutated_copies(original, tmp_path, NUM_MUTATIONS, seed=11):
        files.add(change.split(":")[0].split()[0])
        if not list(find_problems(copy, POOL)):
            unseen.append(change)
    assert unseen == []
    assert {path.name for path in original.iterdir()} == files


def test_a_damaged_block_is_named(tmp_path, capsys):
    folder = write_documents(tmp_path / "set", [np.ones(1_500_000, int)], 300, shard_tokens=10**9)
    path = folder / "tokens-00000.bin"
    content = bytearray(path.read_bytes())
    content[2_500_000] ^= 8
    path.write_bytes(content)
    (folder / "stray.bin").write_bytes(b"")
    assert run(verify_shards, folder, "--workers", 2) == 1
    printed = capsys.readouterr().out
    assert f"{path} and its .crc differ in block 2 (bytes 2097152 to 3000000)" in printed
    assert "stray.bin is not part of the data set" in printed
    assert "SHA-256" in printed
    good = make_dataset(tmp_path / "good")
    assert run(verify_shards, good) == 0
    assert f"{good}: every byte is as it was written" in capsys.readouterr().out


def test_a_shard_that_agrees_with_itself_only(tmp_path):
    """A shard of another data set, with its own index and CRCs, under the name of one of ours."""
    ours, theirs = make_dataset(tmp_path / "a", seed=1), make_dataset(tmp_path / "b", seed=2)
    for suffix in ("bin", "idx", "crc"):
        shutil.copy(theirs / f"tokens-00000.{suffix}", ours / f"tokens-00000.{suffix}")
    assert any("SHA-256" in problem for problem in find_problems(ours, POOL))


def test_a_manifest_that_was_made_to_fit_is_checked_against_the_tokens(tmp_path):
    folder = make_dataset(tmp_path / "set")
    manifest = Manifest.read(folder)
    first, *others = manifest.shards
    changes = [{"max_id": first.max_id + 1}, {"documents": first.documents + 1}, {"tokens": first.tokens - 1}]
    for change in changes:
        shard = type(first)(**{**vars(first), **change})
        type(manifest)(**{**vars(manifest), "shards": (shard, *others)}).write(folder)
        assert list(find_problems(folder, POOL)), change


def test_merged_data_sets(tmp_path, capsys):
    folders = [make_dataset(tmp_path / name, num_tokens=2500, seed=seed) for seed, name in enumerate("ab")]
    assert run(merge_shards, "--input", *folders, "--output", tmp_path / "m") == 0
    merged, parts = TokenDataset.open(tmp_path / "m"), [TokenDataset.open(folder) for folder in folders]
    assert list(find_problems(tmp_path / "m", POOL)) == []
    in_order = [merged.document(number).tobytes() for number in range(merged.num_documents)]
    expected = np.concatenate([part.tokens(0, part.num_tokens) for part in parts])
    assert np.array_equal(merged.tokens(0, merged.num_tokens), expected)
    assert run(merge_shards, "--input", *folders, "--output", tmp_path / "m") == 2
    assert "is there already (a file): choose another --output" in capsys.readouterr().err
    options = ("--shuffle-seed", 1, "--shard-tokens", 1000, "--overwrite")
    assert run(merge_shards, "--input", *folders, "--output", tmp_path / "m", *options) == 0
    shuffled = TokenDataset.open(tmp_path / "m")
    reordered = [shuffled.document(number).tobytes() for number in range(shuffled.num_documents)]
    assert reordered != in_order
    assert sorted(reordered) == sorted(in_order)
    other = make_dataset(tmp_path / "c", vocab_size=400)
    assert run(merge_shards, "--input", folders[0], other, "--output", tmp_path / "n") == 2
    assert "don't fit together: vocab_size is 300 and 400" in capsys.readouterr().err
    (folders[1] / "tokens-00001.bin").write_bytes(b"\0" * 10)
    assert run(merge_shards, "--input", *folders, "--output", tmp_path / "n") == 2
    assert "tokens-00001.bin is damaged" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_import_of_megatron_data(tmp_path, capsys):
    """With documents of several sequences, and one without an end."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    torch = pytest.importorskip("torch")
    documents = [random_documents(300, 257, seed) for seed in range(20)]
    documents[7][-1] = np.append(documents[7][-1][:-1], 5)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.from_numpy(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    (tmp_path / "t.json").write_bytes(byte_tokenizer())
    options = ("--tokenizer", tmp_path / "t.json", "--output", tmp_path / "ours", "--shard-tokens", 1000)
    assert run(import_megatron, "--input", tmp_path / "theirs.idx", *options) == 2
    assert "a document doesn't end with '<|endoftext|>' (token 0)" in capsys.readouterr().err
    expected = [np.concatenate(sequences) for sequences in documents]
    for policy in ("keep", "append"):
        choice = ("--without-eod", policy, "--overwrite")
        assert run(import_megatron, "--input", tmp_path, *options, *choice) == 0
        ours = TokenDataset.open(tmp_path / "ours")
        assert list(find_problems(tmp_path / "ours", POOL)) == []
        if policy == "append":
            expected[7] = np.append(expected[7], 0)
        assert ours.num_documents == 20
        assert all(np.array_equal(ours.document(n), document) for n, document in enumerate(expected))
    content = (tmp_path / "theirs.bin").read_bytes()
    (tmp_path / "theirs.bin").write_bytes(content[:-100])
    assert run(import_megatron, "--input", tmp_path, *options, "--overwrite") == 2
    assert "is cut short" in capsys.readouterr().err
    (tmp_path / "theirs.bin").write_bytes(content[:-2] + struct.pack("<H", 60_000))
    assert run(import_megatron, "--input", tmp_path, *options, "--overwrite", "--without-eod", "keep") == 2
    assert "token id 60000 is outside the vocabulary of 257" in capsys.readouterr().err


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_535, 65_536, 65_537])
def test_the_type_of_the_tokens_follows_one_rule(tmp_path, vocab_size):
    """Defect 7: writer and reader must change over at the same vocabulary; the highest id comes back."""
    folder = write_documents(tmp_path / "set", [np.array([1, vocab_size - 1, 0])], vocab_size)
    dataset = TokenDataset.open(folder)
    assert dataset.document(0).tolist() == [1, vocab_size - 1, 0]
    assert dataset.manifest.dtype == ("uint16" if vocab_size <= 65_536 else "int32")
    assert list(find_problems(folder, POOL)) == []


def test_what_inspect_prints(tmp_path, capsys):
    tokenizer = Tokenizer.from_buffer(byte_tokenizer())
    texts = ["aaa b", "aa", "c" * 500]
    documents = [np.array([*tokenizer.encode(text).ids, 0]) for text in texts]
    folder = write_documents(tmp_path / "set", documents, 257, shard_tokens=5)
    options = ("--document", 0, 1, "--histogram", 3, "--lengths", tmp_path / "l.png", "--verify")
    assert run(inspect_shards, folder, *options) == 0
    printed = capsys.readouterr().out
    assert "3 documents, 510 tokens" in printed
    assert "shortest 3" in printed and "longest 501" in printed
    assert "every byte is as it was written" in printed
    assert printed.endswith("aaa b<|endoftext|>\naa<|endoftext|>\n")
    counted = [line.split()[1:3] for line in printed.splitlines() if "█" in line]
    assert counted == [["500", "98.04%"], ["5", "0.98%"], ["3", "0.59%"]]
    image = pytest.importorskip("PIL.Image").open(tmp_path / "l.png")
    assert image.size == (900, 640)
    assert len(image.getcolors(100_000)) > 3
    assert run(inspect_shards, folder, "--document", 1, "--ids") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(documents[1].tolist())
    (folder / "tokens-00000.bin").write_bytes(b"\1" * 12)
    assert run(inspect_shards, folder, "--verify") == 2


def test_bins_cover_all_lengths():
    for lengths in ([1], [1, 2], [7, 3000], [2**20], [2**20 - 1, 5]):
        edges = length_chart.bins_of(np.array(lengths))
        assert np.histogram(lengths, edges)[0].sum() == len(lengths)
        assert (np.diff(edges) > 0).all()


def test_the_digest_of_the_manifest_is_over_its_bytes(tmp_path):
    folder = make_dataset(tmp_path / "set")
    content = (folder / MANIFEST).read_text()
    body = content.rpartition(",\n")[0]
    assert f'"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"' in content
    assert isinstance(DatasetWriter, type)
