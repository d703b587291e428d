"""Masked language modelling, held against the paper's shares and against a reference of its own."""

import json

import numpy as np
import pytest
import torch

from megatrain.data.errors import DataError
from megatrain.data.feed.objectives import Masked, build_objective
from megatrain.data.feed.rows import Batch
from megatrain.data.feed.validation import num_batches, validation_loader
from megatrain.data.shards.reader import TokenDataset
from megatrain.data.shards.writer import DatasetWriter
from tests.data.factory import byte_tokenizer
from tests.data.reading import SEQ, make_sources, run_config, training_data
from tests.reference.masking import masked

MASK, VOCAB, IGNORE = 299, 300, -100
MASKED = {"objective": "masked", "mask_token": MASK}
ALL = ["concatenate", "mask_documents", "pack_documents", "one_document"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("sequences", ALL)
def test_every_token_fares_as_the_reference_says(sources, sequences):
    """Also in parts of samples, and in any share of the ranks."""
    ramp = [] if "document" in sequences and sequences != "mask_documents" else [{"until_step": 2, "seq_len": SEQ // 2}]
    plain = training_data(sources, {"ramp": ramp}, sequences=sequences)
    data = training_data(sources, {"ramp": ramp}, sequences=sequences, mask_probability=0.4, **MASKED)
    for step in (0, 7):
        before, whole = plain.loader(0, 1).batch(step), data.loader(0, 1).batch(step)
        for row, (tokens, sequence) in enumerate(zip(before.tokens.tolist(), before.sample_ids.tolist(), strict=True)):
            real = len(tokens) if before.lengths is None else int(before.lengths[row])
            wanted = masked("training 5", sequence, tokens, real, {0, MASK}, 0.4, MASK, VOCAB)
            assert (whole.tokens[row].tolist(), whole.labels[row].tolist()) == wanted
        parts = [data.loader(rank, 4).batch(step) for rank in range(4)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert torch.equal(whole.sample_ids, before.sample_ids)


def test_the_shares_are_those_of_the_paper(tmp_path):
    """15 %; of these 80, 10 and 10 %: within four standard deviations."""
    sources = make_sources(tmp_path, "a")
    plain = training_data(sources, {"global_batch_size": 3000}).loader(0, 1)
    loader = training_data(sources, {"global_batch_size": 3000}, **MASKED).loader(0, 1)
    before, after = (torch.stack([one.batch(step).tokens for step in (0, 1)]) for one in (plain, loader))
    labels = torch.stack([loader.batch(step).labels for step in (0, 1)])
    chosen, may_be = labels != IGNORE, before != 0
    assert torch.equal(labels[chosen], before[chosen]) and torch.equal(after[~chosen], before[~chosen])
    assert not (chosen & ~may_be).any()

    def is_share(hits: int, of: int, share: float) -> bool:
        return abs(hits - share * of) < 4 * (of * share * (1 - share)) ** 0.5

    total, hidden = int(chosen.sum()), chosen & (after == MASK)
    kept, other = chosen & (after == before), chosen & (after != MASK) & (after != before)
    assert is_share(total, int(may_be.sum()), 0.15)
    assert is_share(int(hidden.sum()), total, 0.8 + 0.1 / VOCAB)
    assert is_share(int(kept.sum()), total, 0.1 + 0.1 / VOCAB)
    assert is_share(int(other.sum()), total, 0.1)
    drawn = np.bincount(after[other].numpy(), minlength=VOCAB)
    assert drawn.std() < 1.2 * drawn.mean() ** 0.5, "each token is as likely as another"
    place = chosen.float().mean((0, 1))
    assert (place - place.mean()).abs().max() < 4 * (0.15 * 0.85 / 6000) ** 0.5, "each place too"


def test_another_epoch_hides_other_tokens(tmp_path):
    sources = make_sources(tmp_path, "c")
    data = training_data(sources, {"global_batch_size": 1, "steps": 10**4}, sequences="pack_documents", **MASKED)
    size = data.samples["c"].num_samples
    places = [data.samples["c"].places(np.arange(size) + epoch * size).tolist() for epoch in (0, 1)]
    loader, same = data.loader(0, 1), 0
    for row in range(size):
        first, second = (loader.batch(epoch * size + places[epoch].index(row)).labels for epoch in (0, 1))
        same += torch.equal(first != IGNORE, second != IGNORE)
    assert same < size / 4


@pytest.mark.parametrize("sequences", ALL)
def test_validation_hides_always_the_same_and_no_padding(sources, sequences):
    dataset = TokenDataset.open(sources["c"]["path"])
    options = {"sequences": sequences, "seq_len": 32}  # 899 tokens: the last window is short
    loaders = [validation_loader(dataset, run_config({}, {"global_batch_size": 4}, **options, **more), 0, 1)
               for more in (MASKED, MASKED, {})]  # fmt: skip
    for step in range(num_batches(loaders[0]) + 1):
        one, two, causal = (loader.batch(step) for loader in loaders)
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
        assert one.lengths is not None or bool((causal.labels[:, :-1] != IGNORE).any())
        if one.lengths is not None:
            padding = torch.arange(32) >= one.lengths[:, None]
            assert (one.labels[padding] == IGNORE).all() and torch.equal(one.tokens[padding], causal.tokens[padding])
            assert sequences not in ("concatenate", "mask_documents") or causal.lengths is None, "as it always was"
    assert one.lengths is not None and not one.lengths.any(), "a batch after the end is all padding"


def test_padding_is_never_a_label_whatever_token_it_is():
    tokens, ids, lengths = torch.ones(3, SEQ, dtype=torch.int64), torch.arange(3), torch.tensor([SEQ, 5, 0])
    batch = Masked("key", 0.9, MASK, VOCAB)(Batch(tokens, tokens.clone(), ids, None, ids, lengths))
    padding = torch.arange(SEQ) >= lengths[:, None]
    assert (batch.labels[padding] == IGNORE).all() and (batch.tokens[padding] == 1).all()
    assert (batch.labels[~padding] == 1).sum() > 0.6 * lengths.sum()


@pytest.mark.parametrize("name", ["[MASK]", "<mask>"])
def test_the_mask_token_is_the_tokenizers(tmp_path, name):
    content = json.loads(byte_tokenizer())
    content["added_tokens"] += [{"id": 7, "content": name, "special": True}, {"id": 8, "content": "x", "special": True}]
    options = {"vocab_size": VOCAB, "eod_id": 0, "shard_tokens": 10**4}
    with DatasetWriter(
        tmp_path / "a", tokenizer=json.dumps(content).encode(), tokenizer_name="bytes", **options
    ) as writer:
        writer.add(np.arange(1, 16).repeat(20))
        writer.finish()
    data = training_data(str(tmp_path / "a"), objective="masked", mask_probability=0.9)
    tokens, labels = data.loader(0, 1).batch(0)[:2]
    assert bool((tokens == 7).any()) and not np.isin(labels.numpy(), [7, 8]).any(), "special tokens are never labels"
    with pytest.raises(DataError, match="by number 7, and the model has 5"):
        build_objective(data.config.data, data.datasets["train"], 5, "training")


def test_without_a_mask_token_no_run_begins(sources):
    with pytest.raises(DataError, match=r"neither \[MASK\] nor <mask>. Set data.mask_token"):
        training_data(sources, objective="masked")


def test_a_run_goes_on_with_the_objective_that_it_had(sources):
    state = json.loads(json.dumps(training_data(sources).state(3)))
    with pytest.raises(DataError, match=r"data\.objective: 'causal' before, 'masked' now"):
        training_data(sources, **MASKED).resume(state, 3)
    del state["objective"]  # of before there was a choice
    training_data(sources).resume(state, 3)
    with pytest.raises(DataError, match=r"data\.objective: 'causal' before"):
        training_data(sources, **MASKED).resume(state, 3)
