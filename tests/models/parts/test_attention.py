"""Attention against its formula: GPT's, and that with turned and normalised queries and keys."""

from torch import nn

from megatrain.config.schema import RunConfig
from megatrain.models.parts.attention import Attention
from megatrain.parallel.layers import Layers
from tests.models.parts.mixer_suite import SITE, CausalMixerSuite


class TestAttention(CausalMixerSuite):
    """Biases, no turns, all in FP64."""

    family = "gpt"

    @classmethod
    def build(cls, config: RunConfig, layers: Layers) -> nn.Module:
        return Attention(config.model, layers, SITE, head_norms=cls.rotary)

    @staticmethod
    def sees(query: int, key: int) -> bool:
        return key <= query


class TestTurnedAttention(TestAttention):
    """Qwen 3: rotary positions, and a norm on each head's queries and keys. Turns are made in FP32."""

    family, rotary, error = "qwen3", True, 3e-6
