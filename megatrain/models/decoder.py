"""One stack of Transformer blocks: decoders like GPT, Llama and Qwen 3, and BERT's encoder.

Shapes: S sequence, B micro-batch, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatrain.config.schema import PrecisionConfig
from megatrain.models.block import build_block
from megatrain.models.ends import Embedding, Head
from megatrain.models.parts.document_attention import KERNELS
from megatrain.models.parts.documents import Documents, documents_of, own_positions, with_padding
from megatrain.models.parts.loss import sequence_losses
from megatrain.models.parts.norm import build_norm
from megatrain.models.parts.rotary import Rotary, Turns
from megatrain.models.parts.sublayers import MicroBatch, Mixer
from megatrain.parallel.layers import Layers
from megatrain.spec.derive import num_tokens
from megatrain.spec.schema import ModelSpec

_COMPUTE_TYPE = PrecisionConfig()


class Decoder(nn.Module):
    """Some consecutive blocks of the stack; the first also embeds, the last also has the head.

    Parameters have the same names whichever blocks are here. Tied, the last part holds a copy of
    the word embedding under its own name. ``precision`` may keep the residual stream or the logits in FP32.
    """

    def __init__(
        self,
        config: ModelSpec,
        layers: Layers,
        block_range: range,
        first: bool,
        last: bool,
        precision: PrecisionConfig = _COMPUTE_TYPE,
    ):
        super().__init__()
        self.precision, self.document_kernel = precision, KERNELS.get(config.attention.documents)
        self.config, self.factory, self.first, self.last = config, layers, first, last
        tied = config.tie_embeddings
        if first or (last and tied):
            self.embedding = Embedding(config, layers, words_only=not first)
        self.rotary = Rotary(config) if config.positions.kind == "rotary" else None
        self.layers = nn.ModuleDict({str(i): build_block(config, layers, i) for i in block_range})
        self.sees_ahead = any(not mixer.is_causal for mixer in self.modules() if isinstance(mixer, Mixer))
        self.losses: Callable[[Layers, Tensor, Tensor], Tensor] = sequence_losses
        if last:
            self.final_norm = build_norm(config, layers) if config.norm.placement == "pre" else nn.Identity()
            if not tied or config.head_transform:
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
        num_positions = self.factory.gathered_length(x.shape[0])
        turns = None if self.rotary is None else self._turns(self.rotary, num_positions, x.device, documents)
        if lengths_B is not None and self.sees_ahead:
            documents = with_padding(documents, lengths_B, self.factory.sequence_length(num_positions))
        batch = MicroBatch(keys_B, documents, turns, lengths_B)
        for block in self.layers.values():
            x = block(x, batch)
        if not self.last:
            return x
        weight: Tensor = self.embedding.word.weight if self.config.tie_embeddings else self.head.weight  # type: ignore[assignment]
        x = self.final_norm(x)
        if self.config.head_transform:
            x = self.head.transform(x)
        if self.precision.logits_dtype == "fp32":
            x, weight = x.float(), weight.float()
        logits_SBV = self.factory.head_logits(x, weight)
        if self.config.head_transform:
            logits_SBV = logits_SBV + self.head.bias.to(logits_SBV.dtype)
        if self.config.vocab_padding:
            logits_SBV = self.factory.hide_tokens_from(num_tokens(self.config), logits_SBV)
        return logits_SBV if labels_BS is None else self.losses(self.factory, logits_SBV, labels_BS)

    def _turns(self, rotary: Rotary, num_positions: int, device: torch.device, documents: Documents | None) -> Turns:
        positions_SB = own_positions(self.factory.positions(num_positions, device), documents)
        return rotary(positions_SB, self.factory.sequence_length(num_positions))
