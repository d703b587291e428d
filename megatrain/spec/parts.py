"""The parts of a model, each with its parameters.

Letters as in the models: D width, H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary,
E experts.
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from megatrain.spec.derive import mixture_layers
from megatrain.spec.parameter import Initial, Parameter, Role
from megatrain.spec.schema import ModelSpec

_COLUMNS, _ROWS = 0, 1  # the dim of a matrix [outputs, inputs] that the tensor axis splits


def parameters(model: ModelSpec) -> dict[str, Parameter]:
    """All parameters of the whole model by canonical name, in the order of the model."""
    blocks = (entry for layer in range(model.num_layers) for entry in block(model, layer))
    return {entry.name: entry for entry in (*embedding(model), *blocks, *head(model))}


def embedding(model: ModelSpec) -> Iterator[Parameter]:
    """Words, learned positions, token types, and a norm of their sum."""
    yield Parameter("embedding.word.weight", _vocabulary(model), Role.TABLE, "normal", {"tp": 0})
    if model.positions.kind == "learned":
        table = model.max_seq_len, model.hidden_size
        yield Parameter("embedding.position.weight", table, Role.TABLE, "normal")
    if model.positions.num_token_types:
        table = model.positions.num_token_types, model.hidden_size
        yield Parameter("embedding.token_type.weight", table, Role.TABLE, "normal")
    if model.norm.embedding:
        yield from norm(model, "embedding.norm")


def head(model: ModelSpec) -> Iterator[Parameter]:
    """The last norm, the output rows of an untied model, their biases, and the layer before them."""
    if model.norm.placement == "pre":
        yield from norm(model, "final_norm")
    if not model.tie_embeddings:
        yield Parameter("head.weight", _vocabulary(model), Role.HEAD, "normal", {"tp": 0})
    if model.head_transform:
        D = model.hidden_size
        yield Parameter("head.bias", (model.vocab_size,), Role.BIAS, "zeros", {"tp": 0})
        yield Parameter("head.transform.dense.weight", (D, D), Role.MATRIX, "normal")
        yield Parameter("head.transform.dense.bias", (D,), Role.BIAS, "zeros")
        yield from norm(model, "head.transform.norm")


def block(model: ModelSpec, layer: int) -> Iterator[Parameter]:
    """A Transformer block."""
    site = f"layers.{layer}"
    yield from norm(model, f"{site}.attention_norm")
    yield from attention(model, f"{site}.attention")
    yield from norm(model, f"{site}.feed_forward_norm")
    if layer in mixture_layers(model):
        yield from mixture(model, f"{site}.feed_forward")
    else:
        yield from feed_forward(model, f"{site}.feed_forward", model.feed_forward.hidden_size)


def norm(model: ModelSpec, site: str) -> Iterator[Parameter]:
    """A norm of the stream."""
    yield Parameter(f"{site}.weight", (model.hidden_size,), Role.NORM, "ones")
    if model.norm.kind == "layer_norm":
        yield Parameter(f"{site}.bias", (model.hidden_size,), Role.BIAS, "zeros")


def attention(model: ModelSpec, site: str) -> Iterator[Parameter]:
    """Queries, keys and values in one matrix, group by group; and the output."""
    part, D = model.attention, model.hidden_size
    H, G, K = part.num_heads, part.num_kv_heads, part.head_width
    rows = (H // G * K, K, K)
    for entry in _linear(f"{site}.query_key_value", (H + 2 * G) * K, D, part.bias, _COLUMNS):
        yield replace(entry, stacked_rows=rows) if entry.role is Role.MATRIX else entry
    yield from _linear(f"{site}.output", D, H * K, part.bias, _ROWS, "residual")
    if part.head_norms:
        for name in ("query_norm", "key_norm"):
            yield Parameter(f"{site}.{name}.weight", (K,), Role.NORM, "ones")


def feed_forward(model: ModelSpec, site: str, F: int) -> Iterator[Parameter]:
    """The matrices of a feed-forward of width F."""
    for name in _inputs(model):
        yield from _linear(f"{site}.{name}", F, model.hidden_size, model.feed_forward.bias, _COLUMNS)
    yield from _linear(f"{site}.down", model.hidden_size, F, model.feed_forward.bias, _ROWS, "residual")


def mixture(model: ModelSpec, site: str) -> Iterator[Parameter]:
    """A router, the matrices [E, inputs, outputs] of its experts, and the shared ones."""
    part, D = model.experts, model.hidden_size
    E, F, used = part.num_experts, part.hidden_size, Fraction(part.per_token, part.num_experts)
    yield Parameter(f"{site}.router.weight", (E, D), Role.HEAD, "normal")
    for name in ("up", "down", *_inputs(model)[:-1]):
        shape, dim, initial = ((E, F, D), 1, "residual") if name == "down" else ((E, D, F), 2, "normal")
        split = {"ep": 0, "tp": dim}
        yield Parameter(f"{site}.experts.{name}", shape, Role.EXPERTS, initial, split, used=used)  # type: ignore[arg-type]
    if part.num_shared:
        yield from feed_forward(model, f"{site}.shared", part.num_shared * F)


def _inputs(model: ModelSpec) -> tuple[str, ...]:
    """The matrices that a feed-forward multiplies its input by."""
    return ("gate", "up") if model.feed_forward.activation == "swiglu" else ("up",)


def _linear(
    site: str, outputs: int, inputs: int, bias: bool, split: int, initial: Initial = "normal"
) -> Iterator[Parameter]:
    """A matrix [outputs, inputs], of which the tensor axis splits the outputs (columns) or the inputs (rows)."""
    yield Parameter(f"{site}.weight", (outputs, inputs), Role.MATRIX, initial, {"tp": split})
    if bias:
        yield Parameter(f"{site}.bias", (outputs,), Role.BIAS, "zeros", {"tp": 0} if split == _COLUMNS else {})


def _vocabulary(model: ModelSpec) -> tuple[int, int]:
    return model.vocab_size, model.hidden_size
