"""Attention against its formula: GPT's, that with turned and normalised queries and keys, and that with a window."""

from typing import Any, ClassVar

from megatrain.models.parts.attention import Attention
from megatrain.models.parts.bidirectional_attention import BidirectionalAttention
from megatrain.models.parts.window_attention import WindowAttention
from tests.layouts import Layout
from tests.models.parts.mixer_suite import CausalMixerSuite, MixerSuite
from tests.models.parts.suite import TENSOR

WINDOW = 4


class TestAttention(CausalMixerSuite):
    """Biases, no turns, all in FP64."""

    part, family = Attention, "gpt"

    @staticmethod
    def sees(query: int, key: int) -> bool:
        return key <= query


class TestTurnedAttention(TestAttention):
    """Qwen 3: rotary positions, and a norm on each head's queries and keys. Turns are made in FP32."""

    family, rotary, error = "qwen3", True, 3e-6


class TestBidirectionalAttention(MixerSuite):
    """Vaswani et al. 2017, section 3.2.3: a token of an encoder sees all of its document."""

    part, family = BidirectionalAttention, "gpt"
    model: ClassVar[dict[str, Any]] = {"blocks": ["bidirectional"]}
    data: ClassVar[dict[str, Any]] = {"objective": "masked"}
    layouts: ClassVar[tuple[Layout, ...]] = (*TENSOR, Layout(cp=2, cp_method="ulysses"))

    @staticmethod
    def sees(query: int, key: int) -> bool:
        return True


class TestWindowAttention(CausalMixerSuite):
    """Jiang et al. 2023, section 2: a token sees the last positions up to its own."""

    part, family = WindowAttention, "gpt"
    model: ClassVar[dict[str, Any]] = {"blocks": ["window"], "attention.window": WINDOW}

    @staticmethod
    def sees(query: int, key: int) -> bool:
        return query - WINDOW < key <= query
