"""Batches are a pure function of the step; all ranks together read each sample once."""

import threading
import warnings
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatrain.data.errors import DataError
from megatrain.data.feed.prefetch import prefetch
from megatrain.data.feed.validation import num_batches, validation_loader
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.labels import IGNORE
from tests.data.factory import EOD_ID, make_dataset, open_dataset
from tests.data.mutations import mutated_copies
from tests.data.reading import SEQ, make_sources, run_config, training_data


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def folder(sources):
    """The data set of 3000 tokens alone."""
    return sources["a"]["path"]


def make_loader(sources, batch=24, rank=0, size=1, train=None, **data):
    return training_data(sources, {"global_batch_size": batch, **(train or {})}, **data).loader(rank, size)


def test_labels_are_the_next_tokens_of_the_stream(folder):
    batch = make_loader(folder, batch=748).batch(0)  # four epochs: some windows run over the end
    assert batch.tokens.shape == batch.labels.shape == (748, SEQ)
    assert batch.tokens.dtype == batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.positions is None
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    stream = TokenDataset.open(folder).tokens(0, 3000)
    ring = np.concatenate([stream, stream[:SEQ]])
    windows = {tuple(ring[at : at + SEQ + 1]) for at in range(3000)}
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        assert (*tokens, labels[-1]) in windows


def test_an_epoch_reads_every_token_once(folder):
    """3000 tokens are 187 windows of 16 and 8 left over; one batch per window size shows the tokens' counts."""
    loader = make_loader(folder, batch=187)
    stream = np.bincount(TokenDataset.open(folder).tokens(0, 3000), minlength=300)
    for epoch in range(3):
        read = np.bincount(loader.batch(epoch).labels.flatten().numpy(), minlength=300)
        assert (read <= stream).all()
        assert (stream - read).sum() == 3000 - 187 * SEQ


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_ranks_share_the_global_batch(sources, size):
    data = training_data(sources)
    whole, parts = data.loader(0, 1), [data.loader(rank, size) for rank in range(size)]
    for step in (0, 7, 8, 10**9):
        batch, shares = whole.batch(step), [part.batch(step) for part in parts]
        for field in ("tokens", "labels", "sample_ids", "sources"):
            assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(batch, field))
        assert batch.sample_ids.tolist() == list(range(step * 24, step * 24 + 24))


@pytest.mark.parametrize("sequences", ["concatenate", "mask_documents"])
def test_batch_size_and_start_do_not_change_a_sample(sources, sequences):
    small = make_loader(sources, batch=8, sequences=sequences)
    large = make_loader(sources, batch=24, sequences=sequences)
    joined = torch.cat([small.batch(step).tokens for step in range(30)])
    assert torch.equal(joined, torch.cat([batch.tokens for batch in large.batches(0, 10)]))
    resumed = [batch.tokens for batch in large.batches(6, 10)]
    assert torch.equal(torch.cat(resumed), joined[6 * 24 :])


def test_seed_changes_the_order(sources):
    assert not torch.equal(make_loader(sources).batch(0).tokens, make_loader(sources, seed=6).batch(0).tokens)


def test_shorter_sequences_are_cut_from_the_same_samples(sources):
    """Defect 9: another sequence length must not shuffle anew. 12 sequences of 4 and 18 of 8 are 3 and 9 samples."""
    ramp = [
        {"until_step": 2, "global_batch_size": 12, "seq_len": 4},
        {"until_step": 3, "global_batch_size": 18, "seq_len": 8},
    ]
    plain = make_loader(sources, sequences="mask_documents")
    for size in (1, 2, 3, 6):
        loaders = [make_loader(sources, 24, r, size, {"ramp": ramp}, sequences="mask_documents") for r in range(size)]
        ids, tokens, labels = [], [], []
        for step, (count, length) in enumerate([(12, 4), (12, 4), (18, 8), (24, 16), (24, 16)]):
            batches = [loader.batch(step) for loader in loaders]
            assert all(batch.tokens.shape == (count // size, length) for batch in batches)
            assert all((batch.positions[:, 0] == 0).all() for batch in batches)
            ids += [batch.sample_ids for batch in batches]
            tokens += [batch.tokens.flatten() for batch in batches]
            labels += [batch.labels.flatten() for batch in batches]
        assert len(set(torch.cat(ids).tolist())) == 12 + 12 + 18 + 24 + 24, "each has its own dropout"
        expected = [plain.batch(step) for step in range(3)]
        read = 3 + 3 + 9 + 24 + 24
        assert torch.equal(torch.cat(tokens), torch.cat([b.tokens for b in expected])[:read].flatten())
        assert torch.equal(torch.cat(labels), torch.cat([b.labels for b in expected])[:read].flatten())


def test_cu_seqlens_bound_the_documents(sources):
    batch = make_loader(sources, sequences="mask_documents").batch(0)
    bounds = batch.cu_seqlens().tolist()
    assert bounds[0] == 0 and bounds[-1] == batch.tokens.numel()
    tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
    for begin, end in pairwise(bounds):
        assert positions[begin:end].tolist() == list(range(end - begin))
        assert EOD_ID not in tokens[begin : end - 1]
    assert make_loader(sources).batch(0).cu_seqlens().tolist() == list(range(0, 24 * SEQ + 1, SEQ))


@pytest.mark.parametrize("num_tokens", [5, 17, 100, 160, 161, 170])
@pytest.mark.parametrize("sequences", ["concatenate", "mask_documents"])
def test_sequential_scores_every_token_but_the_first_once(tmp_path, num_tokens, sequences):
    dataset = open_dataset(tmp_path / "set", num_tokens=num_tokens)
    config = run_config({}, {"global_batch_size": 4}, sequences=sequences, eod_loss=True)
    loader = validation_loader(dataset, config, 0, 1)
    batches = list(loader.batches(0, num_batches(loader) + 1))
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    assert labels[labels != IGNORE].tolist() == dataset.tokens(0, num_tokens)[1:].tolist()
    assert (batches[-1].labels == IGNORE).all()
    assert min(batch.tokens.min() for batch in batches) >= 0


def test_uneven_batch_and_unknown_rank_are_refused(folder):
    for batch, rank, size in ((7, 0, 2), (8, 2, 2), (8, -1, 2)):
        with pytest.raises(ValueError, match=f"a batch of {batch}"):
            make_loader(folder, batch, rank, size)


def test_an_id_outside_the_model_is_named(tmp_path):
    """Megatron's files have no CRCs, and their vocabulary is not known."""
    folder = make_dataset(tmp_path / "set", num_tokens=900)
    (folder / "manifest.json").unlink()
    with open(folder / "tokens-00000.bin", "r+b") as file:
        file.seek(2 * 700)
        file.write(b"\xff\xff")
    with pytest.warns(UserWarning, match="has no manifest"):
        dataset = TokenDataset.open(folder, vocab_size=300)
    document = dataset.document_of(700)
    assert 700 in range(*dataset.document_bounds(document))
    loader = validation_loader(dataset, run_config({}), 0, 1)
    place = rf"token 700 of .*\(tokens-00000.bin, document {document}, its token \d+\)"
    with pytest.raises(DataError, match=rf"{place} is 65535, outside the model's vocabulary of 300"):
        list(loader.batches(0, num_batches(loader)))


NUM_MUTATIONS = 450


def everything(sources, sequences):
    """All that an epoch serves, and the documents that the microscope shows."""
    data = training_data(sources, {"global_batch_size": 4}, sequences=sequences)
    loader, dataset = data.loader(0, 1), data.datasets["train"]
    batches = [loader.batch(step) for step in range(-(-data.samples["train"].num_samples // 4))]
    served = [part for batch in batches for part in (batch.tokens, batch.labels, batch.positions) if part is not None]
    return [part.tolist() for part in served] + [dataset.document(n).tolist() for n in range(dataset.num_documents)]


def test_no_mutation_is_served(tmp_path):
    """Defect 4: whatever is flipped, cut or gone, the first touch refuses it."""
    original = make_dataset(tmp_path / "set", num_tokens=2000)
    kinds = ("concatenate", "mask_documents", "pack_documents")
    expected = {kind: everything(str(original), kind) for kind in kinds}
    served, refused = [], Counter()
    for number, (copy, change) in enumerate(mutated_copies(original, tmp_path, NUM_MUTATIONS, seed=23)):
        kind = kinds[number % 3]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a manifest that is gone is warned of
                if everything(str(copy), kind) != expected[kind]:
                    served.append(f"{kind}: {change}")
        except (DataError, UserWarning):
            refused[change.split(":")[0].split()[0].split(".")[-1]] += 1
        else:
            assert change.startswith("tokenizer.json"), f"{change}: nobody looked at it"
    assert served == []
    assert min(refused[suffix] for suffix in ("bin", "idx", "crc", "json")) > 20, refused


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_order_and_ends_its_thread():
    assert list(prefetch(iter(range(100)))) == list(range(100))
    assert prefetch_threads() == []


def test_prefetch_stays_ahead_by_its_depth_and_closes():
    made = []
    seen = threading.Event()

    def source():
        for number in range(1000):
            made.append(number)
            if number == 3:
                seen.set()
            yield number

    items = prefetch(source(), depth=2)
    assert next(items) == 0
    assert seen.wait(10)  # two in the queue, one in the thread's hand
    items.close()
    assert max(made) == 3
    assert prefetch_threads() == []


def test_prefetch_raises_in_the_consumer():
    def source():
        yield 1
        raise DataError("broken")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(DataError, match="broken"):
        next(items)
    assert prefetch_threads() == []
