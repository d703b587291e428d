"""What tells one family of decoders from another."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from megatrain.models.parts.experts import GeluExperts, SwiGluExperts
from megatrain.models.parts.feed_forward import GeluFeedForward, SwiGluFeedForward
from megatrain.models.parts.norm import LayerNorm, RMSNorm
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelConfig


@dataclass(frozen=True)
class Family:
    """What tells one family of decoders from another. ``bias``: of the feed-forward's matrices."""

    norm: Callable[[int, float], nn.Module]
    feed_forward: Callable[[int, int, bool, Layers], nn.Module]
    experts: Callable[[ModelConfig, Layers], nn.Module]
    bias: bool
    rotary: bool
    head_norms: bool


FAMILIES = {
    "gpt": Family(LayerNorm, GeluFeedForward, GeluExperts, bias=True, rotary=False, head_norms=False),
    "llama": Family(RMSNorm, SwiGluFeedForward, SwiGluExperts, bias=False, rotary=True, head_norms=False),
    "qwen3": Family(RMSNorm, SwiGluFeedForward, SwiGluExperts, bias=False, rotary=True, head_norms=True),
}
