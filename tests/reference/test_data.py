"""Batches of every kind of sequence, over several epochs, sources and stages, against the reference's rows."""

from typing import Any

import numpy as np
import pytest

from megatrain.config.derive import resolve
from megatrain.config.schema import RunConfig
from megatrain.data.feed.training import TrainingData
from megatrain.data.feed.validation import num_batches, validation_loader, validation_sets
from tests.configs import run_config_of
from tests.data.factory import random_documents, write_documents
from tests.reference.trainer import Trainer

VOCAB = 50


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One of documents around a sequence's length; one of so many that they are packed in several chunks."""
    folder, random = tmp_path_factory.mktemp("corpora"), np.random.default_rng(2)
    long = random_documents(1500, VOCAB, 1)
    short = [np.append(random.integers(1, VOCAB, random.integers(0, 4)), 0) for _ in range(2600)]
    return {
        name: str(write_documents(folder / name, documents, VOCAB))
        for name, documents in {"long": long, "short": short}.items()
    }


CASES: dict[str, dict[str, Any]] = {
    "windows": {"sequences": "concatenate"},
    "windows without a loss at ends": {"sequences": "concatenate", "eod_loss": False},
    "masked": {"sequences": "mask_documents"},
    "packed": {"sequences": "pack_documents"},
    "one document": {"sequences": "one_document"},
}
RAMP = [{"until_step": 3, "global_batch_size": 8, "seq_len": 8}, {"until_step": 5, "global_batch_size": 2}]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("source", ["long", "short"])
def test_batches_of_one_source(corpora: dict[str, str], source: str, case: str) -> None:
    config = config_of({"train": corpora[source], "validation": corpora[source], **CASES[case]}, 60)
    require_same_batches(config)
    require_same_evaluation(config)


def test_batches_of_two_sources_whose_weights_change(corpora: dict[str, str]) -> None:
    train = {"a": {"path": corpora["long"], "weight": "3/7"}, "b": {"path": corpora["short"], "weight": "0.1"}}
    changes = [{"from_sample": 40, "weights": {"a": "2"}}, {"from_sample": 1500, "weights": {"b": "5"}}]
    require_same_batches(config_of({"train": train, "weight_schedule": changes, "sequences": "mask_documents"}, 700))


def config_of(data: dict[str, Any], steps: int) -> RunConfig:
    sections = {
        "data": {"seq_len": 16, "seed": 3, **data},
        "train": {"steps": steps, "global_batch_size": 4, "ramp": RAMP, "eval_batches": 1000},
        "model": {"num_layers": 1, "hidden_size": 8, "attention.num_heads": 1, "vocab_size": VOCAB, "max_seq_len": 16},
    }
    return resolve(run_config_of(sections), 1)


def require_same_batches(config: RunConfig) -> None:
    loader, reference = TrainingData(config, VOCAB).loader(0, 1), Trainer(config.model_dump(mode="json"))
    for step in range(1, config.train.steps + 1):
        ours, expected = loader.batch(step - 1), reference.batch(step)
        for name in ("tokens", "labels", "positions"):
            value, wanted = getattr(ours, name), getattr(expected, name)
            assert (value is None) == (wanted is None), name
            assert value is None or np.array_equal(value, wanted), f"{name} of step {step}"
        assert ours.sample_ids.tolist() == expected.ids, f"step {step}"


def require_same_evaluation(config: RunConfig) -> None:
    """Every label of the set, once, in the stream's order."""
    (dataset,) = validation_sets(config, VOCAB).values()
    loader = validation_loader(dataset, config, 0, 1)
    (source,) = Trainer(config.model_dump(mode="json")).validation.values()
    rows = [source.ordered(number) for number in range(source.num_ordered)]
    batches = [loader.batch(number) for number in range(num_batches(loader))]
    labels = np.concatenate([batch.labels for batch in batches])
    assert np.array_equal(labels[: len(rows)], [row.labels for row in rows])
    assert (labels[len(rows) :] == -100).all()
    seen = labels[: len(rows)] != -100
    tokens = np.concatenate([batch.tokens for batch in batches])[: len(rows)]
    assert np.array_equal(tokens[seen], np.array([row.tokens for row in rows])[seen])
