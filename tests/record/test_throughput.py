"""The model's own operations, against those that torch counts in a real forward and backward pass."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatrain.data.feed.rows import Batch
from megatrain.models.build import build_model
from megatrain.record.throughput import Work, tokens_and_pairs
from megatrain.spec.counts import flops_per_token
from megatrain.spec.schema import ModelSpec
from tests.configs import model_spec

B, S = 2, 12
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "attention.num_heads": 4,
    "vocab_size": 40,
    "max_seq_len": 32,
}
MIXTURE: dict[str, Any] = {
    "experts.num_experts": 5,
    "experts.per_token": 2,
    "experts.hidden_size": 7,
}  # odd: one by one
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt"},
    "gpt-untied": {"family": "gpt", "tie_embeddings": False},
    "llama-grouped": {"attention.num_kv_heads": 2, "feed_forward.hidden_size": 24},
    "llama-tied": {"tie_embeddings": True, "attention.head_width": 6, "attention.bias": True},
    "qwen3": {"family": "qwen3", "attention.num_kv_heads": 1, "attention.head_width": 10, "vocab_padding": 8},
    "mixture": {**MIXTURE, "experts.num_shared": 2, "experts.num_dense_layers": 1, "router.score": "sigmoid"},
    "gpt-mixture": {**MIXTURE, "family": "gpt", "experts.interval": 2, "router.balance_loss": 0.1},
}


def counted(model: ModelSpec, positions: torch.Tensor | None = None) -> int:
    """What torch counts of a step, with attention as plain products: fused kernels compute scores twice."""
    made = build_model(model, seed=1)
    tokens = torch.randint(0, 32, (B, S), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        made(tokens, tokens, None, positions).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_operations_are_those_that_torch_counts(fields: dict[str, Any]) -> None:
    model = model_spec({**SIZES, **fields})
    assert flops_per_token(model, S) * B * S == counted(model)


def test_masked_documents_count_by_their_lengths() -> None:
    model = model_spec({**SIZES, "attention.documents": "per_document"})
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    batch = Batch(positions, positions, torch.arange(B), positions, torch.zeros(B, dtype=torch.int64))
    assert tokens_and_pairs(batch) == (24, 25 + 49 + 1 + 4 + 81)
    work = Work(model, torch.device("cpu"), counts=True)
    work.add(batch)
    assert work.read(lambda own: own) == counted(model, positions)
    work.add(batch._replace(tokens=positions[:, :8], positions=positions[:, :8]))  # a step of a ramp
    one, head_and_blocks = 12 * 3 * 16, 6 * (3 * (4 * 16 * 16 + 3 * 16 * 64) + 40 * 16)
    assert work.read(lambda own: 2 * own) == 2 * (16 * head_and_blocks + one * (25 + 9 + 1 + 4 + 25))
    assert work.read(lambda own: own) == 0, "the count starts anew"


def test_padding_is_no_work() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
    lengths, sources = torch.tensor([5, 8, 0]), torch.zeros(3, dtype=torch.int64)
    packed = Batch(positions, positions, torch.arange(3), positions, sources, lengths)
    assert tokens_and_pairs(packed) == (13, 9 + 4 + 64)
    one_document = packed._replace(positions=None)
    assert tokens_and_pairs(one_document) == (13, 25 + 64)
    assert tokens_and_pairs(one_document._replace(lengths=None)) == (24, 3 * 64)
