"""Batches are a pure function of the step; all ranks together read each sample once."""

import threading

import numpy as np
import pytest
import torch

from megatrain.data.errors import DataError
from megatrain.data.loader import IGNORE, Loader
from megatrain.data.prefetch import prefetch
from megatrain.data.reader import TokenDataset
from tests.data.factory import make_dataset, open_dataset

SEQ = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(tmp_path_factory.mktemp("data") / "set", num_tokens=3000)


def make_loader(dataset, batch=24, rank=0, size=1, **options):
    return Loader(dataset, seq_len=SEQ, global_batch_size=batch, dp_rank=rank, dp_size=size, **{"seed": 5, **options})


def test_labels_are_the_next_tokens_of_the_stream(dataset):
    batch = make_loader(dataset, batch=748).batch(0)  # four epochs: some windows run over the end
    assert batch.tokens.shape == batch.labels.shape == (748, SEQ)
    assert batch.tokens.dtype == batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    stream = dataset.tokens(0, 3000)
    ring = np.concatenate([stream, stream[:SEQ]])
    windows = {tuple(ring[at : at + SEQ + 1]) for at in range(3000)}
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        assert (*tokens, labels[-1]) in windows


def test_an_epoch_reads_every_token_once(dataset):
    """3000 tokens are 187 windows of 16 and 8 left over; one batch per window size shows the tokens' counts."""
    loader = make_loader(dataset, batch=187)
    assert (loader.samples_per_epoch, loader.steps_per_epoch) == (187, 1)
    stream = np.bincount(dataset.tokens(0, 3000), minlength=300)
    for epoch in range(3):
        read = np.bincount(loader.batch(epoch).labels.flatten().numpy(), minlength=300)
        assert (read <= stream).all()
        assert (stream - read).sum() == 3000 - 187 * SEQ


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_ranks_share_the_global_batch(dataset, size):
    for step in (0, 7, 8, 10**9):  # step 7 runs from the first epoch into the second
        whole = make_loader(dataset).batch(step)
        parts = [make_loader(dataset, rank=rank, size=size).batch(step) for rank in range(size)]
        for field in ("tokens", "labels", "sample_ids"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
        assert whole.sample_ids.tolist() == list(range(step * 24, step * 24 + 24))


def test_batch_size_and_start_do_not_change_a_sample(dataset):
    small, large = make_loader(dataset, batch=8), make_loader(dataset, batch=24)
    joined = torch.cat([small.batch(step).tokens for step in range(30)])
    assert torch.equal(joined, torch.cat([batch.tokens for batch in large.batches(0, 10)]))
    resumed = [batch.tokens for batch in large.batches(6, 10)]
    assert torch.equal(torch.cat(resumed), joined[6 * 24 :])


def test_seed_changes_the_order(dataset):
    assert not torch.equal(make_loader(dataset).batch(0).tokens, make_loader(dataset, seed=6).batch(0).tokens)


@pytest.mark.parametrize("num_tokens", [5, 17, 100, 160, 161, 170])
def test_sequential_scores_every_token_but_the_first_once(tmp_path, num_tokens):
    dataset = open_dataset(tmp_path / "set", num_tokens=num_tokens)
    loader = make_loader(dataset, batch=4, order="sequential")
    batches = list(loader.batches(0, loader.steps_per_epoch + 1))
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    assert labels[labels != IGNORE].tolist() == dataset.tokens(0, num_tokens)[1:].tolist()
    assert (batches[-1].labels == IGNORE).all()
    assert min(batch.tokens.min() for batch in batches) >= 0


def test_uneven_batch_and_unknown_rank_are_refused(dataset):
    for batch, rank, size in ((7, 0, 2), (8, 2, 2), (8, -1, 2)):
        with pytest.raises(ValueError, match="global_batch_size"):
            make_loader(dataset, batch, rank, size)


def test_an_id_outside_the_model_is_named(tmp_path):
    """Bits that flipped after the data set was written."""
    folder = make_dataset(tmp_path / "set", num_tokens=900)
    with open(folder / "tokens-00000.bin", "r+b") as file:
        file.seek(2 * 700)
        file.write(b"\xff\xff")
    loader = make_loader(TokenDataset.open(folder, vocab_size=300), order="sequential")
    with pytest.raises(DataError, match=r"token 700 of .* is 65535, outside the model's vocabulary of 300"):
        list(loader.batches(0, loader.steps_per_epoch))


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
