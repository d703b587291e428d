"""Next-token loss. Shapes: S sequence, B micro-batch, V vocabulary."""

import torch
from torch import Tensor

from megatrain.parallel.layers import Layers
from megatrain.spec.labels import IGNORE


def sequence_losses(layers: Layers, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum of the cross-entropies of each sequence's labelled positions [B], FP32.

    Sums, not means: sequences hold different numbers of loss tokens, so only the whole
    step's number is a right divisor.
    """
    labels_SB = labels_BS.transpose(0, 1)
    has_loss = labels_SB != IGNORE
    losses_SB = layers.cross_entropy(logits_SBV, torch.where(has_loss, labels_SB, 0))
    return (losses_SB * has_loss).sum(0)
