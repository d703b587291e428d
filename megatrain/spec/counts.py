"""What a model costs: weights, and operations of a token.

Letters as in the models: L layers, D width, H query heads, K head width, F feed-forward width, V vocabulary.
"""

from megatrain.spec.derive import attention_bias, expert_hidden_size, head_width, mixture_layers, resolve_model
from megatrain.spec.schema import ModelConfig


def num_parameters(model: ModelConfig, active: bool = False) -> int:
    """Exact number of weights of the whole model; a tied head counts once.

    Args:
        active: only those that work on a token: of a mixture's experts, as many as a token passes.
    """
    model = resolve_model(model)
    D = model.hidden_size
    head = 0 if model.tie_embeddings else model.vocab_size * D
    blocks = sum(block_parameters(model, layer, active) for layer in range(model.num_layers))
    return model.vocab_size * D + _position_table(model) + blocks + _norm_parameters(model) + head


def block_parameters(model: ModelConfig, layer: int, active: bool = False) -> int:
    """Exact number of weights of one block; ``active`` as in ``num_parameters``."""
    model = resolve_model(model)
    assert model.num_kv_heads is not None and model.ffn_hidden_size is not None
    D, K = model.hidden_size, head_width(model)
    HK, qkv = model.num_heads * K, (model.num_heads + 2 * model.num_kv_heads) * K
    mixture = layer in mixture_layers(model)
    feed_forward = _mixture(model, active) if mixture else _feed_forward(model, model.ffn_hidden_size)
    biases = qkv + D if attention_bias(model) else 0
    head_norms = 2 * K if model.family == "qwen3" else 0
    return 2 * _norm_parameters(model) + D * qkv + HK * D + feed_forward + biases + head_norms


def _feed_forward(model: ModelConfig, F: int) -> int:
    D = model.hidden_size
    return 2 * D * F + F + D if model.family == "gpt" else 3 * D * F


def _mixture(model: ModelConfig, active: bool) -> int:
    assert model.num_experts is not None
    D, F, matrices = model.hidden_size, expert_hidden_size(model), 2 if model.family == "gpt" else 3
    experts = (model.experts_per_token if active else model.num_experts) * matrices * D * F
    shared = _feed_forward(model, model.num_shared_experts * F) if model.num_shared_experts else 0
    return model.num_experts * D + experts + shared


def _norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.family == "gpt" else 1)


def multiplied_weights(model: ModelConfig) -> int:
    """Weights that a token is multiplied by: those of all matrices that work on it, and nothing else.

    The head counts, tied or not. Tables whose rows are looked up (words, positions) do not, nor do norms and biases. Of
    a mixture's experts as many count as a token chooses, also where capacity drops a choice.
    """
    model = resolve_model(model)
    assert model.num_kv_heads is not None and model.ffn_hidden_size is not None
    D, HK = model.hidden_size, model.num_heads * head_width(model)
    attention = D * (HK + 2 * model.num_kv_heads * head_width(model)) + HK * D
    matrix, experts = (2 if model.family == "gpt" else 3) * D, model.experts_per_token + model.num_shared_experts
    mixture = (model.num_experts or 0) * D + experts * matrix * expert_hidden_size(model)
    mixtures = len(mixture_layers(model))
    feed_forward = mixtures * mixture + (model.num_layers - mixtures) * matrix * model.ffn_hidden_size
    return model.num_layers * attention + feed_forward + model.vocab_size * D


def flops_per_token(model: ModelConfig, attended: float) -> float:
    """Operations of a forward and backward pass per token: 6 N + 12 L H K S (Chowdhery et al. 2022, appendix B).

    N is ``multiplied_weights``. S is ``attended``, how many tokens a token's attention is counted for: all of its
    sequence, or of its document where attention stays inside documents. As in that paper, attention counts as if it
    were not causal, and what activation checkpointing computes again does not count.
    """
    attention = 12 * model.num_layers * model.num_heads * head_width(model) * attended
    return 6 * multiplied_weights(model) + attention


def _position_table(model: ModelConfig) -> int:
    return model.max_seq_len * model.hidden_size if model.family == "gpt" else 0
