"""What a model costs: weights, and operations of a token. All is read off the table of its parts.

Letters as in the models: L layers, H query heads, K head width, S sequence.
"""

import math
from collections.abc import Iterable

from megatrain.spec.derive import block_kind
from megatrain.spec.parameter import Parameter
from megatrain.spec.parts import block, parameters
from megatrain.spec.schema import ModelSpec


def num_parameters(model: ModelSpec, active: bool = False) -> int:
    """Exact number of weights of the whole model; a tied head counts once.

    Args:
        active: only those that work on a token: of a mixture's experts, as many as a token passes.
    """
    return _count(parameters(model).values(), active)


def block_parameters(model: ModelSpec, layer: int, active: bool = False) -> int:
    """Exact number of weights of one block; ``active`` as in ``num_parameters``."""
    return _count(block(model, layer), active)


def multiplied_weights(model: ModelSpec) -> int:
    """Weights that a token is multiplied by: those of all matrices that work on it, and nothing else.

    The head counts, tied or not. Tables whose rows are looked up (words, positions) do not, nor do norms and biases. Of
    a mixture's experts as many count as a token chooses, also where capacity drops a choice.
    """
    tied_head = model.vocab_size * model.hidden_size if model.tie_embeddings else 0
    matrices = (entry for entry in parameters(model).values() if entry.role.treatment.multiplied)
    return _count(matrices, active=True) + tied_head


def flops_per_token(model: ModelSpec, attended: float) -> float:
    """Operations of a forward and backward pass per token: 6 N + 12 L H K S (Chowdhery et al. 2022, appendix B).

    N is ``multiplied_weights``. S is ``attended``, how many tokens a token's attention is counted for: all of its
    sequence, or of its document where attention stays inside documents. As in that paper, attention counts as if it
    were not causal, and what activation checkpointing computes again does not count. A window counts for as many tokens
    as it has at most.
    """
    reach = sum(min(attended, most) for most in (reach_of(model, layer) for layer in range(model.num_layers)))
    return 6 * multiplied_weights(model) + 12 * model.attention.num_heads * model.attention.head_width * reach


def reach_of(model: ModelSpec, layer: int) -> float:
    """How many positions a token sees at most in a block's attention."""
    return model.attention.window if block_kind(model, layer) == "window" else math.inf


def seen_on_average(model: ModelSpec, layer: int, seq_len: int) -> float:
    """How many positions a token sees in a block's attention, on average: half of the sequence, or of a window all but
    what the first tokens lack; all of it where it sees both ways."""
    if block_kind(model, layer) == "bidirectional":
        return seq_len
    reach = min(seq_len, reach_of(model, layer))
    return reach * (1.0 - reach / (2.0 * seq_len))


def _count(entries: Iterable[Parameter], active: bool) -> int:
    return int(sum(entry.size * (entry.used if active else 1) for entry in entries))
