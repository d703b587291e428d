"""The decoder-only Transformer: GPT, Llama and Qwen 3.

Shapes: S sequence, B micro-batch, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from megatrain.config.derive import expert_hidden_size, mixture_layers, num_tokens
from megatrain.config.schema import ModelConfig, PrecisionConfig
from megatrain.models.parts.attention import Attention
from megatrain.models.parts.document_attention import KERNELS
from megatrain.models.parts.documents import Documents, documents_of, own_positions
from megatrain.models.parts.experts import GeluExperts, SwiGluExperts
from megatrain.models.parts.feed_forward import GeluFeedForward, SwiGluFeedForward
from megatrain.models.parts.loss import sequence_losses
from megatrain.models.parts.mixture import MixtureOfExperts
from megatrain.models.parts.norm import LayerNorm, RMSNorm
from megatrain.models.parts.rotary import Rotary, Turns
from megatrain.parallel.layers import Layers


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


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, layers: Layers, number: int):
        super().__init__()
        family, site = FAMILIES[config.family], f"layers.{number}"
        self.attention_norm = layers.on_split_sequence(family.norm(config.hidden_size, config.norm_eps))
        self.attention = Attention(config, layers, site, family.head_norms)
        self.feed_forward_norm = layers.on_split_sequence(family.norm(config.hidden_size, config.norm_eps))
        self.has_experts = number in mixture_layers(config)
        self.feed_forward = _mixture(config, family, layers) if self.has_experts else _dense(config, family, layers)
        self.attention_dropout = layers.dropout(config.dropout, f"{site}.attention.output")
        self.feed_forward_dropout = layers.dropout(config.dropout, f"{site}.feed_forward.output")

    def forward(
        self,
        x_SBD: Tensor,
        keys_B: Tensor | None,
        documents: Documents | None,
        turns: Turns | None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(x_SBD), keys_B, documents, turns)
        x = x_SBD + self.attention_dropout(mixed, keys_B)
        normed = self.feed_forward_norm(x)
        fed = self.feed_forward(normed, lengths_B) if self.has_experts else self.feed_forward(normed)
        return x + self.feed_forward_dropout(fed, keys_B)


def _dense(config: ModelConfig, family: Family, layers: Layers) -> nn.Module:
    assert config.ffn_hidden_size is not None, "resolve the config first"
    return family.feed_forward(config.hidden_size, config.ffn_hidden_size, family.bias, layers)


def _mixture(config: ModelConfig, family: Family, layers: Layers) -> MixtureOfExperts:
    width = config.num_shared_experts * expert_hidden_size(config)
    shared = family.feed_forward(config.hidden_size, width, family.bias, layers) if width else None
    return MixtureOfExperts(config, layers, family.experts(config, layers), shared)


class Embedding(nn.Module):
    """Word embedding, plus learned positions where the family has no rotary ones."""

    def __init__(self, config: ModelConfig, layers: Layers, positions: bool):
        super().__init__()
        self.layers = layers
        self.word = layers.vocab_embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_seq_len, config.hidden_size) if positions else None
        self.dropout = layers.dropout(config.dropout, "embedding")

    def forward(self, tokens_BS: Tensor, keys_B: Tensor | None, documents: Documents | None) -> Tensor:
        if self.position is None:
            return self.dropout(self.layers.embed(self.word, tokens_BS), keys_B)
        own_S = self.layers.positions(tokens_BS.shape[1], tokens_BS.device)
        x_SBD = self.word(tokens_BS).transpose(0, 1) + self.position(own_positions(own_S, documents))
        return self.dropout(self.layers.split_sequence(x_SBD.contiguous()), keys_B)


class Head(nn.Module):
    """Output projection of an untied model."""

    def __init__(self, config: ModelConfig, layers: Layers):
        super().__init__()
        self.weight: nn.Parameter = layers.vocab_embedding(config.vocab_size, config.hidden_size).weight  # type: ignore[assignment]


_COMPUTE_TYPE = PrecisionConfig()


class Decoder(nn.Module):
    """Some consecutive blocks of a decoder; the first also embeds, the last also has the head.

    Parameters have the same names whichever blocks are here. Tied, the last part holds a copy of
    the word embedding under its own name. ``precision`` may keep the residual stream or the logits in FP32.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Layers,
        block_range: range,
        first: bool,
        last: bool,
        precision: PrecisionConfig = _COMPUTE_TYPE,
    ):
        super().__init__()
        family = FAMILIES[config.family]
        self.precision, self.document_kernel = precision, KERNELS.get(config.document_attention)
        self.config, self.factory, self.first, self.last = config, layers, first, last
        tied = bool(config.tie_embeddings)
        if first or (last and tied):
            self.embedding = Embedding(config, layers, positions=first and not family.rotary)
        self.rotary = Rotary(config) if family.rotary else None
        self.layers = nn.ModuleDict({str(i): Block(config, layers, i) for i in block_range})
        self.losses: Callable[[Layers, Tensor, Tensor], Tensor] = sequence_losses
        if last:
            self.final_norm = layers.on_split_sequence(family.norm(config.hidden_size, config.norm_eps))
            if not tied:
                self.head = Head(config, layers)

    def forward(
        self,
        x: Tensor,
        labels_BS: Tensor | None = None,
        keys_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Runs this part.

        Args:
            x: tokens [B, S] in the first part, activations [S, B, D] in the others.
            labels_BS: next tokens; IGNORE where there is no loss. Without them the last part
                returns logits.
            keys_B: the samples' dropout keys.
            positions_BT: places in their documents, which see only themselves, of all tokens of the sequences (also
                of those that other ranks hold); None: each sequence is one document.
            lengths_B: tokens of each whole sequence before its padding, which counts nowhere; None: there is none.
        Returns:
            activations [S, B, D]; from the last part the sequences' losses [B] (sums, FP32) or logits [S, B, V].
        """
        documents = None if positions_BT is None else documents_of(positions_BT, self.document_kernel)
        if self.first:
            x = self.embedding(x, keys_B, documents)
            if self.precision.residual_dtype == "fp32":
                x = x.float()  # each sublayer's output is added to it, and takes its type
        turns = None if self.rotary is None else self._turns(self.rotary, x, documents)
        for block in self.layers.values():
            x = block(x, keys_B, documents, turns, lengths_B)
        if not self.last:
            return x
        weight: Tensor = self.embedding.word.weight if self.config.tie_embeddings else self.head.weight  # type: ignore[assignment]
        x = self.final_norm(x)
        if self.precision.logits_dtype == "fp32":
            x, weight = x.float(), weight.float()
        logits_SBV = self.factory.head_logits(x, weight)
        if self.config.vocab_padding:
            logits_SBV = self.factory.hide_tokens_from(num_tokens(self.config), logits_SBV)
        return logits_SBV if labels_BS is None else self.losses(self.factory, logits_SBV, labels_BS)

    def _turns(self, rotary: Rotary, x_SBD: Tensor, documents: Documents | None) -> Turns:
        num_positions = self.factory.gathered_length(x_SBD.shape[0])
        positions_SB = own_positions(self.factory.positions(num_positions, x_SBD.device), documents)
        return rotary(positions_SB, self.factory.sequence_length(num_positions))
