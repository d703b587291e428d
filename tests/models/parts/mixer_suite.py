"""The cases of every part that mixes positions by attention.

A newcomer says in ``sees`` which positions a query looks at, and in ``build`` how it is made; its formula is here.
Shapes: S sequence, B micro-batch, D width, H query heads, G key/value heads, K head width.
"""

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from megatrain.config.schema import ResolvedRun
from megatrain.models.parts.documents import documents_of
from megatrain.models.parts.rotary import Rotary
from megatrain.models.parts.sublayers import MicroBatch
from megatrain.parallel.dropout import dropout_keys
from megatrain.parallel.layers import Layers
from tests.layouts import Layout
from tests.models.parts.suite import (
    BATCH,
    CONTEXT,
    DOCUMENTS,
    HEADS,
    SEQ,
    TENSOR,
    WIDTH,
    SplitPartSuite,
    Weights,
    activations,
    positions_of,
)
from tests.reference.dropout import Dropout

SEED, IDS, SITE = 11, [3, 2**33 + 5], "layers.0"


class MixerSuite(SplitPartSuite):
    """``rotary``: whether queries and keys are turned, in FP32."""

    layouts: ClassVar[tuple[Layout, ...]] = TENSOR + CONTEXT
    documents: ClassVar[tuple[bool, ...]] = (False, True)
    rotary: ClassVar[bool] = False

    @classmethod
    def build(cls, config: ResolvedRun, layers: Layers) -> nn.Module:
        return cls.part(config.model, layers, SITE)

    @staticmethod
    def sees(query: int, key: int) -> bool:
        """Whether the token at place ``query`` of a document sees the one at ``key``."""
        raise NotImplementedError

    @classmethod
    def run(
        cls,
        part: nn.Module,
        x_SBD: Tensor,
        layers: Layers,
        config: ResolvedRun,
        positions_BS: Tensor | None,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        documents, turns = None if positions_BS is None else documents_of(positions_BS, None), None
        if cls.rotary:
            count = layers.gathered_length(len(x_SBD))
            own_S = layers.positions(count)
            places_SB = own_S[:, None] if positions_BS is None else positions_BS[:, own_S].T
            turns = Rotary(config.model)(places_SB, layers.sequence_length(count))
        return part(x_SBD, MicroBatch(keys_B, documents, turns, None))

    @classmethod
    def expected(
        cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: ResolvedRun, dropout: Dropout | None = None
    ) -> Tensor:
        """Vaswani et al. 2017, eq. 1, head by head; a group of heads shares a key and a value (Ainslie et al. 2023)."""
        x_BSD, head_width = x_SBD.transpose(0, 1), WIDTH // HEADS
        rows = x_BSD @ weights["query_key_value.weight"].T + weights.get("query_key_value.bias", 0)
        groups = (rows.shape[-1] // head_width - HEADS) // 2
        by_group = rows.unflatten(-1, (groups, -1, head_width))  # a group's queries, its key, its value
        visible_BSS = cls.visible(positions_BS)
        chances, values = [], []
        for head in range(HEADS):
            group, inside = divmod(head, HEADS // groups)
            query, key, value = (by_group[:, :, group, row] for row in (inside, -2, -1))
            query, key = (
                _normed(part, weights.get(f"{name}_norm.weight")) for name, part in (("query", query), ("key", key))
            )
            if cls.rotary:
                query, key = _turned(query, positions_BS), _turned(key, positions_BS)
            scores = query @ key.transpose(1, 2) / math.sqrt(head_width)
            chances.append(scores.masked_fill(~visible_BSS, -math.inf).softmax(-1))
            values.append(value)
        chances_BHSS = torch.stack(chances, 1)
        if dropout is not None:
            chances_BHSS = dropout.probabilities(chances_BHSS, f"{SITE}.attention")
        mixed = (chances_BHSS @ torch.stack(values, 1)).transpose(1, 2).flatten(2)
        return (mixed @ weights["output.weight"].T + weights.get("output.bias", 0)).transpose(0, 1)

    @classmethod
    def visible(cls, positions_BS: Tensor) -> Tensor:
        """[B, S, S]: whether a query (row) sees a key (column): of its own document, and by ``sees``."""
        documents_BS = (positions_BS == 0).cumsum(1)
        rule = torch.tensor([[cls.sees(q, k) for k in range(SEQ)] for q in range(SEQ)])
        same = documents_BS[:, :, None] == documents_BS[:, None, :]
        return torch.stack([rule[own][:, own] for own in positions_BS]) & same

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_heads_share_the_keys_of_their_group(self, groups: int) -> None:
        self.compare_on_one_rank(**{"attention.num_kv_heads": groups})

    @pytest.mark.parametrize("documents", [False, True])
    def test_a_position_sees_what_it_may(self, documents: bool) -> None:
        """Moves one token after the other and looks where the output moves."""
        config, layers = self.config(), Layers()
        part = self.with_weights(config, layers)
        positions = positions_of(*DOCUMENTS) if documents else None
        before = self.run(part, activations(), layers, config, positions)
        visible_BSS = self.visible(positions_of(*[[SEQ]] * BATCH) if positions is None else positions)
        for key in range(SEQ):
            x = activations()
            x[key] += 1.0
            moved = (self.run(part, x, layers, config, positions) - before).abs().amax(-1).T > 1e-9  # B, S
            assert torch.equal(moved, visible_BSS[:, :, key]), f"of the token at {key}"

    def test_a_packed_sequence_gives_what_its_documents_give_alone(self) -> None:
        config, layers = self.config(), Layers()
        part, lengths = self.with_weights(config, layers), DOCUMENTS[0]
        x = activations()[:, :1]
        packed = self.run(part, x, layers, config, positions_of(lengths))
        alone = [self.run(part, document, layers, config, None) for document in x.split(lengths)]
        self.near(packed.detach(), torch.cat(alone).detach(), "packed")

    @pytest.mark.parametrize("documents", [False, True])
    def test_dropout_falls_on_the_probabilities(self, documents: bool) -> None:
        config, layers = self.config(**{"attention.dropout": 0.3}), Layers()
        part = self.with_weights(config, layers).train()
        positions = positions_of(*DOCUMENTS) if documents else positions_of(*[[SEQ]] * BATCH)
        keys = dropout_keys(SEED, torch.tensor(IDS))
        found = self.run(part, activations(), layers, config, positions if documents else None, keys)
        mask = Dropout(0.3, SEED, IDS)
        expected = self.expected(self.weights(config), activations(), positions, config, mask)
        error = float((found - expected).detach().abs().max() / expected.abs().max())
        assert error < 1e-6, "the softmax is FP32 there"


class CausalMixerSuite(MixerSuite):
    """What every causal mixer must hold besides."""

    @classmethod
    def core(cls, part: nn.Module) -> nn.Module:
        """The heads themselves: (queries, keys, values, dropout keys, documents) -> mixed values [S, B, H, K]."""
        return part.core

    @pytest.mark.parametrize("documents", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_the_last_queries_alone_get_what_they_get_among_all(self, dropout: float, documents: bool) -> None:
        """As generation with a cache and context ranks have it: all keys up to the last query, some queries."""
        config, generator = self.config(**{"attention.dropout": dropout}), torch.Generator().manual_seed(4)
        core = self.core(self.with_weights(config, Layers())).train()
        query, key, value = (torch.randn(SEQ, BATCH, heads, 8, generator=generator).double() for heads in (4, 2, 2))
        plan = documents_of(positions_of(*DOCUMENTS), None) if documents else None
        keys = dropout_keys(SEED, torch.tensor(IDS))
        whole = core(query, key, value, keys, plan)
        for first, end in ((0, 3), (5, 6), (4, 12), (11, 12)):
            found = core(query[first:end], key[:end], value[:end], keys, plan)
            error = float((found - whole[first:end]).abs().max())
            assert error < (1e-6 if dropout else 1e-12), f"queries {first} to {end - 1}"  # with dropout in FP32


def _normed(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turned(x_BSK: Tensor, positions_BS: Tensor) -> Tensor:
    """Su et al. 2021, the pair (i, i + K/2) as a complex number, turned by position x 10000^(-2i/K)."""
    half: Any = x_BSK.shape[-1] // 2
    angles = positions_BS[..., None].double() * 10000.0 ** -(torch.arange(half) / half).double()
    z = torch.complex(x_BSK[..., :half], x_BSK[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)
