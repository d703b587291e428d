"""What a model is: the section ``model`` of a config, a section for each part.

``ModelConfig`` is what a user writes: what is left open is filled by the family's preset and by other fields.
``ModelSpec`` is the same with nothing left open (``derive.resolve_model``).
"""

from typing import Annotated, Literal

from pydantic import Field

from megatrain.spec.families import ABOUT, FamilyName
from megatrain.spec.section import Natural, Positive, PositiveFloat, Probability, Section, Weight

PositionKind = Literal["learned", "rotary"]
NormKind = Literal["layer_norm", "rms_norm"]
NormPlacement = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_erf", "swiglu"]
BlockKind = Literal["full", "window", "bidirectional"]


class AttentionConfig(Section):
    """Self-attention."""

    num_heads: Positive = Field(8, description="Query heads H; must divide hidden_size where head_width is not set.")
    num_kv_heads: Positive | None = Field(
        None, description="Key/value heads (grouped-query attention); default: num_heads."
    )
    head_width: Positive | None = Field(None, description="Width K of a head; default: hidden_size / num_heads.")
    bias: bool | None = Field(None, description="Biases in the attention's matrices; default: the family's.")
    head_norms: bool | None = Field(None, description="A norm on each head's queries and keys; default: the family's.")
    window: Positive = Field(
        4096, description="Blocks of the kind window: how many positions a query sees, its own being the last."
    )
    dropout: Probability = Field(0.0, description="Dropout of the attention probabilities.")
    documents: Literal["dense", "per_document", "flex", "varlen"] = Field(
        "dense",
        description="How attention stays inside documents (data.sequences mask_documents and pack_documents). dense: a "
        "mask of all pairs, in every layout. per_document: one document after the other, no work for other pairs; for "
        "CPUs and long documents. flex, varlen: FlexAttention, or FlashAttention's kernel for many lengths (GPUs).",
    )


class PositionsConfig(Section):
    """How the model knows where a token stands."""

    kind: PositionKind | None = Field(
        None,
        description="learned: a table with a row for each position, added to the embeddings. rotary: queries and keys "
        "are turned by their positions (model.rope). Default: the family's.",
    )
    num_token_types: Natural | None = Field(
        None,
        description="Rows of a table of token types, added to the embeddings (BERT's segments; every token of a batch "
        "is of type 0); 0: none. Default: the family's.",
    )


class RopeConfig(Section):
    """Rotary positions, and how they are stretched."""

    theta: PositiveFloat = Field(10000.0, description="Base of the rotary frequencies.")
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = Field(
        "none", description="How the rotary frequencies are stretched for sequences longer than those first trained on."
    )
    factor: Annotated[float, Field(ge=1.0)] = Field(
        1.0,
        description="Stretch of the low rotary frequencies (linear: of all; dynamic: of the lowest, in a sequence of "
        "twice the original length, less 1; longrope: of the longest sequence).",
    )
    original_max_seq_len: Positive | None = Field(
        None, description="All but linear: longest sequence before the stretch; default: max_seq_len."
    )
    short_factors: list[PositiveFloat] | None = Field(
        None, description="longrope: stretch of each of the K/2 frequencies in sequences up to the original length."
    )
    long_factors: list[PositiveFloat] | None = Field(None, description="longrope: the same in longer sequences.")
    low_freq_factor: PositiveFloat = Field(
        1.0, description="llama3: a frequency with fewer turns than this in the original length is stretched in full."
    )
    high_freq_factor: PositiveFloat = Field(
        4.0, description="llama3: a frequency with more turns than this stays as it is."
    )
    beta_fast: PositiveFloat = Field(32.0, description="yarn: a frequency with more turns stays as it is.")
    beta_slow: PositiveFloat = Field(1.0, description="yarn: one with fewer turns is stretched in full.")
    attention_factor: PositiveFloat | None = Field(
        None, description="yarn, longrope: factor on turned queries and keys; default: by model.rope.factor."
    )


class FeedForwardConfig(Section):
    """The feed-forward sublayer of a dense block."""

    hidden_size: Positive | None = Field(
        None,
        description="Width F; default: 4 D (gelu), 8/3 D rounded up to a multiple of 64 (swiglu, whose three matrices "
        "then have as many weights as two).",
    )
    activation: Activation | None = Field(
        None,
        description="gelu: down(gelu(up x)), by GPT-2's formula with tanh. gelu_erf: the same, exact. swiglu: "
        "down(silu(gate x) · up x). Default: the family's.",
    )
    bias: bool | None = Field(
        None, description="Biases in its matrices; experts never have them. Default: the family's."
    )


class NormConfig(Section):
    """The norms of the stream."""

    kind: NormKind | None = Field(
        None, description="layer_norm (with a bias) or rms_norm (without); default: the family's."
    )
    placement: NormPlacement | None = Field(
        None,
        description="pre: before each sublayer, x + f(norm(x)), and before the head. post: after each sum, "
        "norm(x + f(x)). Default: the family's.",
    )
    embedding: bool | None = Field(None, description="A norm behind the embeddings; default: the family's.")
    eps: PositiveFloat = Field(1e-5, description="Epsilon inside the square root of the norms.")


class ExpertsConfig(Section):
    """Mixture of experts in place of the feed-forward."""

    num_experts: Natural = Field(0, description="Experts E of each mixture-of-experts block; 0: the model is dense.")
    per_token: Positive = Field(2, description="Routed experts that each token passes (top-k).")
    hidden_size: Positive | None = Field(
        None, description="Width F of an expert, which has no biases; default: feed_forward.hidden_size."
    )
    num_shared: Natural = Field(0, description="Experts that every token passes; one feed-forward so wide.")
    num_dense_layers: Natural = Field(0, description="First blocks that have a dense feed-forward instead of experts.")
    interval: Positive = Field(
        1, description="n: of every n blocks, counted from the first, only the last has experts; the others are dense."
    )
    capacity: Weight | None = Field(
        None,
        description="Choices that an expert takes of one sequence, as a multiple of its even share; what comes later "
        "in the sequence is dropped. Default: no limit (dropless).",
    )


class RouterConfig(Section):
    """How tokens choose their experts."""

    score: Literal["softmax", "sigmoid"] = Field("softmax", description="How the router scores the experts.")
    normalize: bool = Field(True, description="Divide the gates of a token by their sum.")
    scale: PositiveFloat = Field(1.0, description="Factor on the gates.")
    groups: Positive = Field(1, description="Groups G of neighbouring experts; must divide num_experts.")
    groups_per_token: Positive = Field(
        1, description="Groups that a token may choose its experts from: those whose two best add up highest."
    )
    balance_loss: Weight = Field(
        0.01, description="Weight of the auxiliary load-balancing loss, counted over each sequence."
    )
    z_loss: Weight = Field(0.0, description="Weight of the square of the logits' log-sum-exp.")
    balance_rate: Weight = Field(
        0.0, description="Step of the balance bias, which moves the choice of experts without a loss; 0: no bias."
    )


class ModelConfig(Section):
    """Shape of the Transformer."""

    family: FamilyName = Field("llama", description=f"A choice of parts, each of which can be set. {ABOUT}")
    num_layers: Positive = Field(4, le=10_000, description="Transformer blocks.")
    blocks: list[BlockKind] | None = Field(
        None,
        min_length=1,
        description="What mixes positions, block by block; a shorter list is repeated. full: attention to all "
        "positions up to a token's own. window: to the last model.attention.window of them. bidirectional: to all "
        "positions, also those behind (data.objective masked). Default: the family's.",
    )
    hidden_size: Positive = Field(256, description="Width D of the residual stream.")
    vocab_size: Positive = Field(8192, description="Rows V of the embedding; must be divisible by parallel.tp.")
    vocab_padding: Natural = Field(
        0,
        description="Rows at the end of the embedding that stand for no token: they take no part in the softmax, "
        "so a vocabulary made divisible gives the same numbers.",
    )
    max_seq_len: Positive = Field(1024, description="Longest sequence that the positions are made for.")
    tie_embeddings: bool | None = Field(
        None, description="Use the word embedding as the output head; default: the family's."
    )
    head_transform: bool | None = Field(
        None,
        description="A dense layer, exact GELU and a norm before the output rows, and a bias for each token "
        "behind them (BERT's head of masked language models); default: the family's.",
    )
    init_std: PositiveFloat = Field(0.02, description="Standard deviation of the initial weights.")
    dropout: Probability = Field(0.0, description="Dropout of embeddings and of each sublayer's output.")
    attention: AttentionConfig = AttentionConfig()
    positions: PositionsConfig = PositionsConfig()
    rope: RopeConfig = RopeConfig()
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    norm: NormConfig = NormConfig()
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()


class AttentionSpec(AttentionConfig):
    """Resolved."""

    num_kv_heads: Positive
    head_width: Positive
    bias: bool
    head_norms: bool


class PositionsSpec(PositionsConfig):
    """Resolved."""

    kind: PositionKind
    num_token_types: Natural


class RopeSpec(RopeConfig):
    """Resolved."""

    original_max_seq_len: Positive


class FeedForwardSpec(FeedForwardConfig):
    """Resolved."""

    hidden_size: Positive
    activation: Activation
    bias: bool


class NormSpec(NormConfig):
    """Resolved."""

    kind: NormKind
    placement: NormPlacement
    embedding: bool


class ExpertsSpec(ExpertsConfig):
    """Resolved."""

    hidden_size: Positive


class ModelSpec(ModelConfig):
    """A model with nothing left open."""

    blocks: list[BlockKind]
    tie_embeddings: bool
    head_transform: bool
    attention: AttentionSpec
    positions: PositionsSpec
    rope: RopeSpec
    feed_forward: FeedForwardSpec
    norm: NormSpec
    experts: ExpertsSpec
