"""A run's data: resumed anywhere, in any layout and with other weights, the stream goes on; other data are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.load import load_config
from megatrain.data.errors import DataError
from megatrain.data.feed.validation import validation_sets
from megatrain.data.shards.manifest import Manifest
from tests.data.factory import make_dataset, random_documents, write_documents
from tests.data.reading import SEQ, make_sources, run_config, training_data


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


def read(data, first, end, size=1):
    """What all ranks read at the steps ``first`` to ``end - 1``: (source, tokens) by sequence."""
    loaders = [data.loader(rank, size) for rank in range(size)]
    found = []
    for step in range(first, end):
        for loader in loaders:
            batch = loader.batch(step)
            found += zip(batch.sources.tolist(), map(tuple, batch.tokens.tolist()), strict=True)
    return found


def resumed(data, step, sources, train=None, **options):
    """The data of another start, from the state as a checkpoint holds it."""
    state = json.loads(json.dumps(data.state(step)))
    other = training_data(sources, train, **options)
    other.resume(state, step)
    return other


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 40), size=st.sampled_from([1, 2, 3, 4]), batch=st.sampled_from([12, 24, 36]))
def test_resumed_with_other_ranks_and_batches_the_stream_goes_on(sources, stop, size, batch):
    data = training_data(sources)
    whole = read(data, 0, 46)
    other = resumed(data, stop, sources, {"global_batch_size": batch, "steps": 999})
    steps = (46 - stop) * 24 // batch
    assert read(other, stop, stop + steps, size) == whole[stop * 24 : stop * 24 + steps * batch]
    again = resumed(other, stop + 1, sources, {"global_batch_size": 24})
    assert read(again, 0, stop) == whole[: stop * 24], "what was read before stays as it was"
    assert again.steps.first_sample(stop + 2) == stop * 24 + batch + 24
    assert read(again, stop + 1, stop + 2) == read(training_data(sources), 0, 60)[stop * 24 + batch :][:24]


@settings(max_examples=15, deadline=None)
@given(stop=st.integers(0, 60), weights=st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any))
def test_other_weights_lose_and_repeat_nothing(sources, stop, weights):
    """Defect 9: Megatron's blends can't change while a run is under way."""
    data = training_data(sources)
    changed = {name: {**source, "weight": str(w)} for (name, source), w in zip(sources.items(), weights, strict=True)}
    other = resumed(data, stop, changed)
    seen, _ = other.blend(np.arange((stop + 40) * 24))
    before, _ = data.blend(np.arange(stop * 24))
    assert np.array_equal(seen[: stop * 24], before)
    for number in range(3):
        own = other.blend(np.flatnonzero(seen == number))[1]
        assert own.tolist() == list(range(len(own)))
    counts = np.array(other.blend.counts(stop * 24 + 1024)) - other.blend.counts(stop * 24)
    assert (np.abs(counts - 1024 * np.array(weights) / sum(weights)) < 1).all()
    again = resumed(other, stop + 20, changed)
    assert again.blend.segments == other.blend.segments, "the same config plans nothing anew"


def test_a_source_can_join_later(sources):
    few = {name: sources[name] for name in ("b", "c")}
    data = training_data(few)
    other = resumed(data, 10, sources)
    assert other.names == ["b", "c", "a"]
    assert [text for _, text in read(other, 0, 10)] == [text for _, text in read(data, 0, 10)]
    assert other.state(30)["sources"]["a"]["consumed"] > 100


def test_a_ramp_goes_on_where_it_was(sources):
    ramp = {"ramp": [{"until_step": 4, "global_batch_size": 8, "seq_len": 8}, {"until_step": 9, "seq_len": 4}]}
    data = training_data(sources, ramp)
    for stop in (2, 4, 7, 9, 12):
        assert read(resumed(data, stop, sources, ramp), stop, 20) == read(data, stop, 20)
    # as checkpoints have it, those of before among them
    assert data.state(0)["stages"] == [
        {"from_step": 0, "batch_size": 8, "seq_len": 8},
        {"from_step": 4, "batch_size": 24, "seq_len": 4},
        {"from_step": 9, "batch_size": 24, "seq_len": 16},
    ]
    # the rest of the ramp is given up
    other = resumed(data, 2, sources)
    assert [other.steps.first_sample(step) for step in (0, 1, 2, 3, 4)] == [0, 4, 8, 32, 56]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "data.seed: 5 before, 6 now"),
        ({"seq_len": 8}, "data.seq_len: 16 before, 8 now"),
        ({"sequences": "mask_documents"}, "data.sequences: 'concatenate' before, 'mask_documents' now"),
    ],
)
def test_other_samples_are_refused(sources, change, message):
    with pytest.raises(DataError, match=message):
        resumed(training_data(sources), 3, sources, **change)


def test_other_data_under_the_same_path_are_refused(tmp_path):
    """Defect 1 of Megatron's data sets: its index cache is keyed by the path."""
    sources = make_sources(tmp_path)
    data = training_data(sources)
    shutil.rmtree(tmp_path / "b")
    make_dataset(tmp_path / "b", 1700, seed=99)
    with pytest.raises(DataError, match=r"(?s)can't go on.*data.train.b: .*b holds other data") as error:
        resumed(data, 3, sources)
    assert "data.train.a" not in str(error.value)
    with pytest.raises(DataError, match=r"data.train.c: is gone. To read no more of it, set its weight to 0"):
        resumed(training_data(sources), 3, {name: sources[name] for name in "ab"})


def test_the_order_knows_nothing_of_the_run(sources):
    """Defects 2 and 3: a longer run keeps its order, and an epoch ends before the next begins."""
    short, long = (training_data(sources["a"]["path"], {"steps": steps}) for steps in (5, 5000))
    assert read(short, 0, 5) == read(long, 0, 5)
    epochs = read(long, 0, 24 * 187 // 24)
    for epoch in range(3):
        windows = [tokens for _, tokens in epochs[187 * epoch : 187 * (epoch + 1)]]
        assert len(windows) == 187 or epoch == 2
        assert len(set(windows)) == len(windows)


def test_nothing_is_written_beside_the_data(sources):
    """Defect 5: there is no cache that could be torn, or that a read-only folder could refuse."""
    folders = [Path(source["path"]) for source in sources.values()]
    before = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    read(training_data(sources), 0, 3)
    assert [sorted(path.name for path in folder.iterdir()) for folder in folders] == before


def test_sample_counts_are_whole_numbers(tmp_path):
    """Defect 6: a float32 makes 16,384 of 16,385."""
    length = 16_385 * SEQ + 1
    dataset = write_documents(tmp_path / "set", [np.append(np.ones(length - 1, int), 0)], 300, shard_tokens=10**9)
    assert training_data(str(dataset)).samples["train"].num_samples == 16_385


def test_weights_by_tokens_and_temperature(sources):
    plain = {name: {"path": source["path"]} for name, source in sources.items()}
    by_tokens = training_data(plain, weigh_by="tokens").state(0)["plan"]["changes"][0][1]
    assert by_tokens == {"a": "3000", "b": "1700", "c": "900"}
    flat = training_data(plain, weigh_by="tokens", temperature=5.0)
    shares = np.array(flat.blend.counts(flat.blend.segments[0].block_size))
    expected = np.array([3000, 1700, 900]) ** 0.2
    assert np.allclose(shares / shares.sum(), expected / expected.sum(), atol=2 / shares.sum())


def test_a_weight_schedule_and_caps(sources):
    schedule = [{"from_sample": 240, "weights": {"a": 0, "c": 2}}]
    data = training_data(sources, weight_schedule=schedule)
    assert data.blend.counts(240)[0] == data.blend.counts(2400)[0] > 100
    again = training_data(sources, weight_schedule=[*schedule, {"from_sample": 480, "weights": {"b": 5}}])
    last = again.state(0)["plan"]["changes"][-1]
    assert last == [480, {"a": "0", "b": "5", "c": "2"}], "what a change does not name stays as the one before left it"
    capped = {name: {**source, "max_epochs": 1.5} for name, source in sources.items()}
    data = training_data(capped)
    assert data.blend.num_samples == sum(int(1.5 * s.num_samples) for s in data.samples.values())
    data.require_samples(data.blend.num_samples // 24)
    with pytest.raises(DataError, match=r"all sources reach their max_epochs after 523 samples, in step 22; train.ste"):
        data.require_samples(50)
    with pytest.raises(DataError, match="all sources are used up"):
        data.loader(0, 1).batch(21)


def test_sources_of_different_tokenizers_are_refused(tmp_path, sources):
    other = write_documents(tmp_path / "other", random_documents(500, 300, 1), 300)
    replace(Manifest.read(other), tokenizer_sha256="0" * 64).write(other)
    with pytest.raises(DataError, match=r"other was written with another tokenizer \(bytes\) than .*: their token ids"):
        training_data({**sources, "other": {"path": str(other)}})
    with pytest.raises(DataError, match="another tokenizer"):
        validation_sets(run_config(sources, validation=str(other)), 300)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    with pytest.raises(DataError, match=rf"another tokenizer .* than data.tokenizer = {tokenizer}"):
        training_data(sources, tokenizer=str(tokenizer))


def test_a_source_without_a_sample_is_refused_before_training(tmp_path, sources):
    tiny = write_documents(tmp_path / "tiny", [np.array([1, 0])], 300)
    with pytest.raises(DataError, match=r"tiny has 2 tokens, a sample needs 17: lower data.seq_len or add data"):
        training_data({**sources, "tiny": {"path": str(tiny)}})


def test_validation_sets_stay_apart(sources):
    config = run_config(sources, validation={name: source["path"] for name, source in sources.items()})
    assert {name: dataset.num_tokens for name, dataset in validation_sets(config, 300).items()} == {
        "a": 3000, "b": 1700, "c": 900
    }  # fmt: skip
    assert list(validation_sets(run_config(sources, validation=sources["a"]["path"]), 300)) == ["validation"]


def test_a_run_reads_its_config_from_yaml(tmp_path, sources):
    text = f"""
data:
  seq_len: 16
  train:
    a: {sources["a"]["path"]}
    b: {{path: {sources["b"]["path"]}, weight: 0.3, max_epochs: 2}}
  validation: {sources["c"]["path"]}
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = load_config([path], []).config
    assert config.data.train["b"].weight == "3/10" and config.data.train["a"].weight == "1"
    assert config.data.validation == {"validation": sources["c"]["path"]}
    batch = training_data(config.data.model_dump()["train"]).loader(0, 1).batch(0)
    assert batch.sources.unique().tolist() == [0, 1]
