"""Derived values, and counts against published ones."""

from typing import Any

import pytest

from megatrain.config.derive import data_parallel_size, grad_accum_steps, resolve, tokens_per_step
from megatrain.config.schema import RunConfig
from megatrain.spec.counts import flops_per_token, num_parameters
from megatrain.spec.derive import ffn_hidden_size, head_width
from megatrain.spec.schema import ModelConfig

GPT2 = ModelConfig(family="gpt", num_layers=12, hidden_size=768, num_heads=12, vocab_size=50257, max_seq_len=1024)
LLAMA_8B = ModelConfig(
    num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_hidden_size=14336, vocab_size=128256
)
LLAMA_1B = ModelConfig(
    num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, ffn_hidden_size=8192, vocab_size=128256,
    tie_embeddings=True,
)  # fmt: skip


def config(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(("model", "number"), [(GPT2, 124439808), (LLAMA_8B, 8030261248), (LLAMA_1B, 1235814400)])
def test_parameters_of_published_models(model: ModelConfig, number: int) -> None:
    assert num_parameters(model) == number


def test_the_head_counts_once_when_tied() -> None:
    untied = GPT2.model_copy(update={"tie_embeddings": False})
    assert num_parameters(untied) - num_parameters(GPT2) == 50257 * 768


def test_operations_per_token() -> None:
    """Matrices and head alone: a block of GPT-2 has 12 D^2 weights; Llama 3 8B's table is looked up, 65 norms scale."""
    assert flops_per_token(GPT2, 1024) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(LLAMA_8B, 8192) == 6 * (8030261248 - 128256 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 8192


@pytest.mark.parametrize(
    ("family", "hidden_size", "width"),
    [("gpt", 100, 400), ("llama", 96, 256), ("llama", 256, 704), ("llama", 4096, 10944), ("llama", 24, 64)],
)
def test_feed_forward_width(family: Any, hidden_size: int, width: int) -> None:
    assert ffn_hidden_size(ModelConfig(family=family, hidden_size=hidden_size)) == width
    assert ffn_hidden_size(ModelConfig(family=family, hidden_size=hidden_size, ffn_hidden_size=7)) == 7


def test_resolving_fills_what_is_open_and_nothing_else() -> None:
    resolved = resolve(config(parallel={"tp": 2, "pp": 2}, model={"num_heads": 4}), world_size=12)
    assert resolved.parallel.dp == 3
    assert resolved.model.num_kv_heads == 4
    assert resolved.model.ffn_hidden_size == 704
    assert resolved.model.tie_embeddings is False
    assert resolved.schedule.decay_steps == 100
    assert RunConfig.model_validate(resolved.model_dump()) == resolved
    assert resolve(resolved, world_size=12) == resolved


def test_set_values_stay() -> None:
    model = {"num_kv_heads": 2, "ffn_hidden_size": 64, "tie_embeddings": False, "family": "gpt"}
    model |= {"head_width": 48, "attention_bias": False}
    given = config(model=model, parallel={"dp": 2}, schedule={"decay_steps": 7})
    assert resolve(given, world_size=2) == given


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


@pytest.mark.parametrize(
    ("dp", "world_size", "expected"), [(None, None, None), (3, None, 3), (None, 8, 2), (None, 6, None), (None, 2, None)]
)
def test_data_parallel_size(dp: int | None, world_size: int | None, expected: int | None) -> None:
    assert data_parallel_size(config(parallel={"tp": 4, "dp": dp}), world_size) == expected


def test_counts_of_a_step() -> None:
    run = config(
        train={"global_batch_size": 24, "micro_batch_size": 2}, parallel={"dp": 3}, data={"seq_len": 128}
    )  # fmt: skip
    assert grad_accum_steps(run) == 4
    assert tokens_per_step(run) == 24 * 128
    assert head_width(GPT2) == 64
