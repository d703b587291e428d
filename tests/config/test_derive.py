"""Derived values, and counts against published ones."""

from typing import Any

import pytest

from megatrain.config.derive import data_parallel_size, grad_accum_steps, num_ranks, resolve, tokens_per_step
from megatrain.config.schema import RunConfig
from megatrain.spec.counts import flops_per_token, num_parameters
from megatrain.spec.keys import flat
from megatrain.spec.schema import ModelSpec
from tests.configs import model_spec, run_config_of

_LLAMA = {"attention.num_heads": 32, "attention.num_kv_heads": 8, "vocab_size": 128256}
GPT2 = model_spec(
    {"family": "gpt", "num_layers": 12, "hidden_size": 768, "attention.num_heads": 12, "vocab_size": 50257}
)
LLAMA_8B = model_spec({"num_layers": 32, "hidden_size": 4096, "feed_forward.hidden_size": 14336, **_LLAMA})
LLAMA_1B = model_spec(
    {"num_layers": 16, "hidden_size": 2048, "feed_forward.hidden_size": 8192, "tie_embeddings": True, **_LLAMA}
)


def config(**sections: dict[str, Any]) -> RunConfig:
    return run_config_of(sections)


@pytest.mark.parametrize(("model", "number"), [(GPT2, 124439808), (LLAMA_8B, 8030261248), (LLAMA_1B, 1235814400)])
def test_parameters_of_published_models(model: ModelSpec, number: int) -> None:
    assert num_parameters(model) == number


def test_the_head_counts_once_when_tied() -> None:
    untied = GPT2.model_copy(update={"tie_embeddings": False})
    assert num_parameters(untied) - num_parameters(GPT2) == 50257 * 768


def test_operations_per_token() -> None:
    """Matrices and head alone: a block of GPT-2 has 12 D^2 weights; Llama 3 8B's table is looked up, 65 norms scale."""
    assert flops_per_token(GPT2, 1024) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(LLAMA_8B, 8192) == 6 * (8030261248 - 128256 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 8192


def test_a_window_is_attended_to_and_no_more() -> None:
    """Of two blocks one has a window of 8: at 32 positions attention costs 12 H K (8 + 32), at 4 it has no effect."""
    shape = {"num_layers": 2, "hidden_size": 16, "attention.num_heads": 2, "vocab_size": 10}
    full = model_spec(shape)
    mixed = model_spec({**shape, "blocks": ["window", "full"], "attention.window": 8})
    assert flops_per_token(full, 32) - flops_per_token(mixed, 32) == 12 * 16 * (2 * 32 - (8 + 32))
    assert flops_per_token(full, 4) == flops_per_token(mixed, 4)


@pytest.mark.parametrize(
    ("family", "hidden_size", "width"),
    [("gpt", 100, 400), ("llama", 96, 256), ("llama", 256, 704), ("llama", 4096, 10944), ("llama", 24, 64)],
)
def test_feed_forward_width(family: Any, hidden_size: int, width: int) -> None:
    model = {"family": family, "hidden_size": hidden_size}
    assert model_spec(model).feed_forward.hidden_size == width
    assert model_spec({**model, "feed_forward.hidden_size": 7}).feed_forward.hidden_size == 7


def test_resolving_fills_what_is_open_and_nothing_else() -> None:
    resolved = resolve(config(parallel={"tp": 2, "pp": 2}, model={"attention.num_heads": 4}), world_size=12)
    assert resolved.parallel.dp == 3
    assert resolved.model.attention.num_kv_heads == 4
    assert resolved.model.feed_forward.hidden_size == 704
    assert resolved.model.tie_embeddings is False
    assert resolved.schedule.decay_steps == 100
    assert resolve(run_config_of(resolved.model_dump()), world_size=12) == resolved
    assert resolve(resolved, world_size=12) == resolved


def test_set_values_stay() -> None:
    model = {"attention.num_kv_heads": 2, "feed_forward.hidden_size": 64, "tie_embeddings": False, "family": "gpt"}
    model |= {"attention.head_width": 48, "attention.bias": False}
    given = config(model=model, parallel={"dp": 2}, schedule={"decay_steps": 7})
    resolved = flat(resolve(given, world_size=2).model_dump())
    assert all(resolved[key] == value for key, value in flat(given.model_dump()).items() if value is not None)


@pytest.mark.parametrize(
    ("name", "steps", "decay"),
    [("cosine", 95, 95), ("linear", 95, 95), ("wsd", 95, 10), ("constant", 95, None), ("inverse_sqrt", 95, None)],
)
def test_decay_follows_the_schedule(name: str, steps: int, decay: int | None) -> None:
    resolved = resolve(config(schedule={"name": name}, train={"steps": steps}), world_size=1)
    assert resolved.schedule.decay_steps == decay


def test_families_tie_differently() -> None:
    assert resolve(config(model={"family": "gpt"}), 1).model.tie_embeddings is True
    assert resolve(config(model={"family": "llama"}), 1).model.tie_embeddings is False


def test_context_ranks_leave_fewer_data_ranks() -> None:
    given = config(parallel={"tp": 2, "cp": 2})
    assert data_parallel_size(given, 12) == resolve(given, 12).parallel.dp == 3


def test_ranks_of_a_layout() -> None:
    """Every axis counts, each by a prime of its own; the experts' ranks are among those that are there."""
    sizes = {"tp": 2, "cp": 3, "pp": 5}
    assert num_ranks(config(parallel={**sizes, "dp": 7}).parallel) == 210
    assert num_ranks(config(parallel=sizes).parallel) == 30
    assert num_ranks(config(parallel={"dp": 4, "ep": 2}).parallel) == 4


@pytest.mark.parametrize(
    ("dp", "world_size", "expected"), [(None, None, None), (3, None, 3), (None, 8, 2), (None, 6, None), (None, 2, None)]
)
def test_data_parallel_size(dp: int | None, world_size: int | None, expected: int | None) -> None:
    assert data_parallel_size(config(parallel={"tp": 4, "dp": dp}), world_size) == expected


def test_counts_of_a_step() -> None:
    train = {"global_batch_size": 24, "micro_batch_size": 2}
    run = resolve(config(train=train, parallel={"dp": 3}, data={"seq_len": 128}), 3)
    assert grad_accum_steps(run) == 4
    assert tokens_per_step(run) == 24 * 128
    assert GPT2.attention.head_width == 64
