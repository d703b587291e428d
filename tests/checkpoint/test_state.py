"""States that another version, or anybody, wrote: one message, before memory is taken by what they say."""

import pytest

from megatrain.checkpoint.state import require_state, saved_model
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError, UnfitError
from megatrain.inference.generate import load_model
from megatrain.spec.keys import flat, nested
from tests.checkpoint.odd import MODEL, model_state, save_run


def with_model(changes):
    state = model_state(2)
    return {**state, "model": nested({**flat(state["model"]), **changes})}


def without(*fields):
    return {field: value for field, value in model_state(2).items() if field not in fields}


def test_a_whole_state_gives_its_model(tmp_path):
    reader = CheckpointReader(save_run(tmp_path))
    assert require_state(reader)["tokens"] == 128
    assert saved_model(reader).hidden_size == MODEL.hidden_size


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            with_model({"gated_memory": 1, "a_new_one": 2}),
            UnfitError,
            r"model\.a_new_one, model\.gated_memory\. Update",
        ),
        (without("model", "router_biases"), CheckpointError, "model is missing"),
        ({**model_state(2), "model": [1]}, CheckpointError, r"model is \[1\]"),
        (with_model({"num_layers": 10**9}), CheckpointError, "holds 10 arrays, too few for num_layers 1000000000"),
        (with_model({"num_layers": 2}), CheckpointError, r"layers\.1\.attention_norm\.weight is missing"),
        (with_model({"num_layers": "all"}), CheckpointError, "num_layers: Input should be a valid integer"),
        (with_model({"hidden_size": 2**62}), CheckpointError, "no model can be made"),
        (with_model({"vocab_size": 2**40}), CheckpointError, r"is \[16, 8\] instead of \[1099511627776, 8\]"),
        (with_model({"feed_forward.hidden_size": 16}), CheckpointError, r"feed_forward\.\S+ is \[\d+, 8\] instead of"),
    ],
)
def test_a_state_that_is_no_model_of_these_tensors(tmp_path, state, error, message):
    path = save_run(tmp_path, (2,), state)
    with pytest.raises(error, match=message) as told:
        saved_model(CheckpointReader(path))
    assert str(path) in str(told.value)
    with pytest.raises(error, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("router_biases", "tokens"), "tokens is missing; router_biases is missing"),
        ({**model_state(2), "router_biases": {"layers.0": ["x"]}}, "router_biases are not lists of numbers"),
        ({**model_state(2), "optimizer_steps": "2", "data": None}, "optimizer_steps is '2'; data is None"),
    ],
)
def test_a_state_to_go_on_from_is_complete(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        require_state(CheckpointReader(save_run(tmp_path, (2,), state)))
