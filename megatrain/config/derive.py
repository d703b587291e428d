"""Values that follow from others: defaults that depend on the model, the layout or the world, and counts.

Letters as in the models: L layers, D width, H query heads, G key/value heads, K head width, F feed-forward width,
V vocabulary, S sequence.
"""

import math

from megatrain.config.schema import ModelConfig, ParallelConfig, RunConfig

_FFN_MULTIPLE = 64  # whole tiles of a matrix unit, and room for tensor parallelism


def resolve(config: RunConfig, world_size: int) -> RunConfig:
    """``config`` with every derived field filled in, for a run of ``world_size`` ranks.

    The config must have passed ``rules.check`` with that world size.
    """
    parallel, schedule = config.parallel, config.schedule
    dp = parallel.dp or world_size // (parallel.tp * parallel.cp * parallel.pp)
    return config.model_copy(
        update={
            "model": resolve_model(config.model),
            "parallel": parallel.model_copy(update={"dp": dp}),
            "schedule": schedule.model_copy(update={"decay_steps": decay_steps(config)}),
        }
    )


def resolve_model(model: ModelConfig) -> ModelConfig:
    """``model`` with its derived fields filled in."""
    tied = model.family == "gpt" if model.tie_embeddings is None else model.tie_embeddings
    update = {
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "head_width": head_width(model),
        "attention_bias": attention_bias(model),
        "ffn_hidden_size": ffn_hidden_size(model),
        "tie_embeddings": tied,
    }
    return model.model_copy(update=update)


def ffn_hidden_size(model: ModelConfig) -> int:
    """F: as set, else 4 D (gpt) or 8/3 D rounded up to a multiple of 64 (the others).

    SwiGLU has three matrices where GELU has two, so 8/3 D keeps the parameters of 4 D (Shazeer 2020).
    """
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if model.family == "gpt":
        return 4 * model.hidden_size
    return math.ceil(8 * model.hidden_size / (3 * _FFN_MULTIPLE)) * _FFN_MULTIPLE


def decay_steps(config: RunConfig) -> int | None:
    """Steps of the decay, as `schedule.decay_steps` describes them; None where the schedule has no such number."""
    schedule = config.schedule
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    if schedule.name in ("cosine", "linear"):
        return config.train.steps
    return math.ceil(config.train.steps / 10) if schedule.name == "wsd" else None


def data_parallel_rank(parallel: ParallelConfig, rank: int) -> int:
    """Place of a rank among those that read different sequences: ranks count tp first, then cp, dp and pp."""
    return rank // (parallel.tp * parallel.cp) % (parallel.dp or 1)


def data_parallel_size(config: RunConfig, world_size: int | None) -> int | None:
    """dp, where it is set or follows from ``world_size``; None where it does not."""
    parallel = config.parallel
    if parallel.dp is not None or world_size is None:
        return parallel.dp
    dp, left_over = divmod(world_size, parallel.tp * parallel.cp * parallel.pp)
    return dp if dp and not left_over else None


def head_width(model: ModelConfig) -> int:
    """K: columns of one attention head."""
    return model.head_width or model.hidden_size // model.num_heads


def original_length(model: ModelConfig) -> int:
    """Longest sequence before the rotary frequencies were stretched."""
    return model.rope_original_max_seq_len or model.max_seq_len


def mixture_layers(model: ModelConfig) -> range:
    """Blocks that have experts."""
    if not model.num_experts:
        return range(0)
    every = model.expert_interval
    first = -(-(model.num_dense_layers + 1) // every) * every - 1
    return range(first, model.num_layers, every)


def expert_hidden_size(model: ModelConfig) -> int:
    """F of one expert."""
    return model.expert_hidden_size or ffn_hidden_size(model)


def attention_bias(model: ModelConfig) -> bool:
    """Whether the attention's matrices have biases."""
    return model.family == "gpt" if model.attention_bias is None else model.attention_bias


def num_tokens(model: ModelConfig) -> int:
    """Tokens of the vocabulary, without the padding rows."""
    return model.vocab_size - model.vocab_padding


def grad_accum_steps(config: RunConfig) -> int:
    """Micro-batches of a rank in one step; ``config`` is resolved."""
    assert config.parallel.dp is not None, "resolve the config first"
    return config.train.global_batch_size // (config.train.micro_batch_size * config.parallel.dp)


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one global batch."""
    return config.train.global_batch_size * config.data.seq_len


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
