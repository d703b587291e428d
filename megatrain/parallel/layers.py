"""The layers that a model is made of, as plain PyTorch: one rank holds every matrix whole.

``Layers`` is what models are given to build themselves with. Its sibling in ``tensor`` has the
same methods and splits the matrices over ranks; a model cannot tell which one it got.
Shapes: S sequence, B micro-batch, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.parallel.context import WholeSequence
from megatrain.parallel.dropout import AttentionDropout, Dropout


class Layers:
    """Factory of a model's layers, all matrices whole. ``context``: which positions of the sequences are here."""

    def __init__(self, context: WholeSequence | None = None):
        self.context = context or WholeSequence()

    def column_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Linear whose outputs are independent of each other (may be split over ranks)."""
        return nn.Linear(in_features, out_features, bias)

    def row_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Linear that takes what a column linear gave out, and returns whole outputs."""
        return nn.Linear(in_features, out_features, bias)

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Module:
        """Embedding table [V, D]: tokens [...] -> [..., D]."""
        return nn.Embedding(vocab_size, width)

    def head_logits(self, x_SBD: Tensor, weight_VD: Tensor) -> Tensor:
        """Logits [S, B, V] (V: the part of the vocabulary that ``weight_VD`` holds)."""
        return F.linear(x_SBD, weight_VD)

    def vocab_start(self, width: int) -> int:
        """First token of this rank's part of a vocabulary that is split into parts of ``width``."""
        return 0

    def hide_tokens_from(self, first: int, logits_SBV: Tensor) -> Tensor:
        """Takes the tokens from number ``first`` on out of the softmax."""
        width = logits_SBV.shape[-1]
        tokens_V = torch.arange(width, device=logits_SBV.device) + self.vocab_start(width)
        return logits_SBV.masked_fill(tokens_V >= first, -torch.inf)

    def cross_entropy(self, logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
        """Loss of each token [S, B], FP32. Labels must lie in the vocabulary."""
        loss = F.cross_entropy(logits_SBV.float().flatten(0, 1), labels_SB.flatten(), reduction="none")
        return loss.view_as(labels_SB)

    def positions(self, num_local: int, device: torch.device | None = None) -> Tensor:
        """Positions in the sequence [``num_local``] of the tokens that are here."""
        return self.context.positions(num_local, device)

    def attention(self, core: nn.Module) -> nn.Module:
        """Lets the queries that are here attend by ``core`` to all keys of their sequence, wherever they are."""
        return self.context.attention(core)

    def on_split_sequence(self, module: nn.Module) -> nn.Module:
        """Declares that ``module`` works on activations that may be split over the sequence."""
        return module

    def on_split_heads(self, module: nn.Module) -> nn.Module:
        """Declares that ``module``, which is the same for all heads, works on heads that may be split over ranks."""
        return module

    def split_sequence(self, x_SBD: Tensor) -> Tensor:
        """Enters the region where activations may be split over the sequence."""
        return x_SBD

    def dropout(self, probability: float, site: str) -> nn.Module:
        """Dropout of [S, B, D] activations; ``site`` is its place in the model, like a canonical name."""
        return Dropout(probability, site, self.positions)

    def attention_dropout(self, probability: float, site: str) -> nn.Module:
        """Dropout of attention probabilities [B, H, S, T]: the last S of T positions attend to all T."""
        return AttentionDropout(probability, site, self.context.head_part(0))

    def local_part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """The part of a whole tensor that this rank's ``parameter`` holds."""
        return whole

    def gather_vocab(self, logits: Tensor) -> Tensor:
        """Logits with the whole vocabulary in the last dim."""
        return logits


def partition_dim(parameter: Tensor) -> int | None:
    """Dim along which a parameter is split over the tensor axis; None: each rank holds it whole."""
    return getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None


def whole_shape(parameter: Tensor, local_shape: torch.Size, tp: int) -> tuple[int, ...]:
    """Shape of a parameter as one rank would hold it."""
    dim = partition_dim(parameter)
    return tuple(size * tp if i == dim else size for i, size in enumerate(local_shape))
