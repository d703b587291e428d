"""Attention in both directions against loops in FP64; padding and other documents are not seen."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatrain.models.build import build_model
from megatrain.models.parts.bidirectional_attention import BidirectionalCore
from megatrain.models.parts.documents import documents_of, with_padding
from megatrain.parallel.layers import Layers
from megatrain.spec.counts import flops_per_token, seen_on_average
from tests.configs import model_spec
from tests.layouts import ONE_PROCESS, random_positions, run_config

S, B, H, G, K = 11, 3, 4, 2, 5
LENGTHS = torch.tensor([11, 4, 0])
MASKED = {"data": {"objective": "masked"}}


def spec(**model: Any) -> Any:
    sizes = {"hidden_size": H * K, "attention.num_heads": H, "attention.num_kv_heads": G}
    return model_spec({"blocks": ["bidirectional"], "positions.kind": "learned", **sizes, **model})


def by_loops(query: Tensor, key: Tensor, value: Tensor, seen_BSS: Tensor) -> Tensor:
    """Vaswani et al. 2017, eq. 1, of the pairs that are ``seen``."""
    mixed = torch.zeros(S, B, H, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for place in range(S):
                keys = [other for other in range(S) if seen_BSS[b, place, other]]
                scores = key[keys, b, h * G // H] @ query[place, b, h] / math.sqrt(K)
                mixed[place, b, h] = scores.softmax(0) @ value[keys, b, h * G // H]
    return mixed


def pairs(positions: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Whether two places are of one document, where neither is padding; padding sees all padding."""
    seen = torch.ones(B, S, S, dtype=torch.bool)
    for b in range(B):
        for i in range(S):
            for j in range(S):
                low, high = min(i, j), max(i, j)
                if positions is not None and (positions[b, low + 1 : high + 1] == 0).any():
                    seen[b, i, j] = False
                if lengths is not None and high >= lengths[b]:
                    seen[b, i, j] = bool(low >= lengths[b])
    return seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_a_token_sees_all_of_its_document(documents: bool, padded: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(S, B, heads, K, generator=generator, dtype=torch.float64) for heads in (H, G, G))
    positions = random_positions(generator)[:B, :S] if documents else None
    lengths = LENGTHS if padded else None
    told = None if positions is None else documents_of(positions, None)
    told = told if lengths is None else with_padding(told, lengths, S)
    wanted = by_loops(query, key, value, pairs(positions, lengths))
    core = BidirectionalCore(spec(), Layers(), "layers.0")
    torch.testing.assert_close(core(query, key, value, None, told), wanted)
    slow = BidirectionalCore(spec(**{"attention.dropout": 1e-12}), Layers(), "layers.0")  # the path with dropout
    mixed = slow(query, key, value, torch.arange(B), told)
    torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("blocks", [["bidirectional"], ["full", "bidirectional"]])
def test_what_is_padding_does_not_matter(blocks: list[str]) -> None:
    model = build_model(run_config("llama", ONE_PROCESS, model={"blocks": blocks}, **MASKED).model, seed=1)
    tokens = torch.randint(0, 64, (3, S), generator=torch.Generator().manual_seed(0))
    padding = torch.arange(S) >= LENGTHS[:, None]
    other = torch.where(padding, (tokens + 1) % 64, tokens)
    one, two = (model(x, lengths_B=LENGTHS).transpose(0, 1) for x in (tokens, other))
    assert torch.equal(one[~padding], two[~padding]) and bool(one.isfinite().all())
    blind = model(other)
    assert not torch.equal(blind.transpose(0, 1)[~padding], two[~padding])


def test_every_token_changes_all_others() -> None:
    model = build_model(run_config("llama", ONE_PROCESS, model={"blocks": ["bidirectional"]}, **MASKED).model, seed=1)
    tokens = torch.randint(0, 64, (1, S), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 64
    assert (model(tokens) != model(changed)).any(-1).all()


def test_what_it_costs() -> None:
    """A causal token sees (S + 1) / 2 positions, about half; this one all."""
    both, causal = (spec(num_layers=1, blocks=[kind]) for kind in ("bidirectional", "full"))
    assert seen_on_average(both, 0, 64) == 64 and seen_on_average(causal, 0, 64) == 32
    assert flops_per_token(both, 64) == flops_per_token(causal, 64), "MFU counts as if nothing were causal"
