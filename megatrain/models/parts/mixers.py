"""The mixers by their names in ``model.blocks``."""

from megatrain.models.parts.attention import Attention
from megatrain.models.parts.bidirectional_attention import BidirectionalAttention
from megatrain.models.parts.sublayers import Mixer
from megatrain.models.parts.window_attention import WindowAttention
from megatrain.parallel.layers import Layers
from megatrain.spec.derive import block_kind
from megatrain.spec.schema import ModelSpec

MIXERS: dict[str, type[Attention]] = {
    "full": Attention,
    "window": WindowAttention,
    "bidirectional": BidirectionalAttention,
}


def build_mixer(config: ModelSpec, layers: Layers, number: int) -> Mixer:
    """The mixer of block ``number``."""
    return MIXERS[block_kind(config, number)](config, layers, f"layers.{number}")
