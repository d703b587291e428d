"""What a model is, as the fields of a config."""

from typing import Annotated, Literal

from pydantic import Field

from megatrain.spec.section import (
    Natural,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Weight,
)


class ModelConfig(Section):
    """Shape of the Transformer."""

    family: Literal["gpt", "llama", "qwen3"] = Field(
        "llama",
        description="gpt: learned positions, LayerNorm, GELU, biases, tied embeddings. "
        "llama: rotary positions, RMSNorm, SwiGLU, no biases, untied embeddings. "
        "qwen3: llama with a norm on each head's queries and keys.",
    )
    num_layers: Positive = Field(4, le=10_000, description="Transformer blocks.")
    hidden_size: Positive = Field(256, description="Width D of the residual stream.")
    num_heads: Positive = Field(8, description="Query heads H; must divide hidden_size where head_width is not set.")
    num_kv_heads: Positive | None = Field(
        None, description="Key/value heads (grouped-query attention); default: num_heads."
    )
    head_width: Positive | None = Field(None, description="Width K of a head; default: hidden_size / num_heads.")
    attention_bias: bool | None = Field(
        None, description="Biases in the attention's matrices; default: true for gpt, false for the others."
    )
    ffn_hidden_size: Positive | None = Field(
        None,
        description="Width F of the feed-forward layer; default: 4 D (gpt), "
        "8/3 D rounded up to a multiple of 64 (the others).",
    )
    num_experts: Positive | None = Field(
        None, description="Experts E of each mixture-of-experts block; default: none, the model is dense."
    )
    experts_per_token: Positive = Field(2, description="Routed experts that each token passes (top-k).")
    expert_hidden_size: Positive | None = Field(
        None, description="Width F of an expert, which has no biases; default: ffn_hidden_size."
    )
    num_shared_experts: Natural = Field(0, description="Experts that every token passes; one feed-forward so wide.")
    num_dense_layers: Natural = Field(0, description="First blocks that have a dense feed-forward instead of experts.")
    expert_interval: Positive = Field(
        1, description="n: of every n blocks, counted from the first, only the last has experts; the others are dense."
    )
    expert_capacity: Weight | None = Field(
        None,
        description="Choices that an expert takes of one sequence, as a multiple of its even share; what comes later "
        "in the sequence is dropped. Default: no limit (dropless).",
    )
    router_score: Literal["softmax", "sigmoid"] = Field("softmax", description="How the router scores the experts.")
    router_normalize: bool = Field(True, description="Divide the gates of a token by their sum.")
    router_scale: PositiveFloat = Field(1.0, description="Factor on the gates.")
    router_groups: Positive = Field(1, description="Groups G of neighbouring experts; must divide num_experts.")
    router_groups_per_token: Positive = Field(
        1, description="Groups that a token may choose its experts from: those whose two best add up highest."
    )
    router_balance_loss: Weight = Field(
        0.01, description="Weight of the auxiliary load-balancing loss, counted over each sequence."
    )
    router_z_loss: Weight = Field(0.0, description="Weight of the square of the logits' log-sum-exp.")
    router_balance_rate: Weight = Field(
        0.0, description="Step of the balance bias, which moves the choice of experts without a loss; 0: no bias."
    )
    vocab_size: Positive = Field(8192, description="Rows V of the embedding; must be divisible by parallel.tp.")
    vocab_padding: Natural = Field(
        0,
        description="Rows at the end of the embedding that stand for no token: they take no part in the softmax, "
        "so a vocabulary made divisible gives the same numbers.",
    )
    max_seq_len: Positive = Field(1024, description="Longest sequence that the positions are made for.")
    tie_embeddings: bool | None = Field(
        None, description="Use the word embedding as the output head; default: true for gpt, false for the others."
    )
    norm_eps: PositiveFloat = Field(1e-5, description="Epsilon inside the square root of the norms.")
    rope_theta: PositiveFloat = Field(10000.0, description="Base of the rotary frequencies (llama, qwen3).")
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = Field(
        "none", description="How the rotary frequencies are stretched for sequences longer than those first trained on."
    )
    rope_scaling_factor: Annotated[float, Field(ge=1.0)] = Field(
        1.0,
        description="Stretch of the low rotary frequencies (linear: of all; dynamic: of the lowest, in a sequence of "
        "twice the original length, less 1; longrope: of the longest sequence).",
    )
    rope_original_max_seq_len: Positive | None = Field(
        None, description="All but linear: longest sequence before the stretch; default: max_seq_len."
    )
    rope_short_factors: list[PositiveFloat] | None = Field(
        None, description="longrope: stretch of each of the K/2 frequencies in sequences up to the original length."
    )
    rope_long_factors: list[PositiveFloat] | None = Field(None, description="longrope: the same in longer sequences.")
    rope_low_freq_factor: PositiveFloat = Field(
        1.0, description="llama3: a frequency with fewer turns than this in the original length is stretched in full."
    )
    rope_high_freq_factor: PositiveFloat = Field(
        4.0, description="llama3: a frequency with more turns than this stays as it is."
    )
    rope_beta_fast: PositiveFloat = Field(32.0, description="yarn: a frequency with more turns stays as it is.")
    rope_beta_slow: PositiveFloat = Field(1.0, description="yarn: one with fewer turns is stretched in full.")
    rope_attention_factor: PositiveFloat | None = Field(
        None, description="yarn, longrope: factor on turned queries and keys; default: by rope_scaling_factor."
    )
    init_std: PositiveFloat = Field(0.02, description="Standard deviation of the initial weights.")
    dropout: Probability = Field(0.0, description="Dropout of embeddings and of each sublayer's output.")
    attention_dropout: Probability = Field(0.0, description="Dropout of the attention probabilities.")
    document_attention: Literal["dense", "per_document", "flex", "varlen"] = Field(
        "dense",
        description="How attention stays inside documents (data.sequences mask_documents and pack_documents). dense: a "
        "mask of all pairs, in every layout. per_document: one document after the other, no work for other pairs; for "
        "CPUs and long documents. flex, varlen: FlexAttention, or FlashAttention's kernel for many lengths (GPUs).",
    )
