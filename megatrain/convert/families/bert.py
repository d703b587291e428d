"""BERT, Devlin et al. 2019, with its head of a masked language model."""

from megatrain.convert.families.family import Family
from megatrain.convert.forms import QUERY_KEY_VALUE, VOCABULARY
from megatrain.convert.table import Line, untied


def _both(ours: str, theirs: str) -> tuple[Line, Line]:
    """Weight and bias of a module."""
    return Line(f"{ours}.weight", f"{theirs}.weight"), Line(f"{ours}.bias", f"{theirs}.bias")


def _queries_keys_values(kind: str) -> Line:
    theirs = tuple(f"bert.encoder.layer.{{}}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
    return Line(f"layers.{{}}.attention.query_key_value.{kind}", theirs, QUERY_KEY_VALUE)


_LAYER = "bert.encoder.layer.{}"
BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    ours="bert",
    prefix="bert.",
    blocks="bert.encoder.layer",
    head="cls.predictions.decoder.weight",
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    left_out=("bert.pooler.", "cls.seq_relationship."),
    older={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    auto="AutoModelForMaskedLM",
    output="cls",
    lines=(
        Line("embedding.word.weight", "bert.embeddings.word_embeddings.weight", VOCABULARY),
        Line("embedding.position.weight", "bert.embeddings.position_embeddings.weight"),
        Line("embedding.token_type.weight", "bert.embeddings.token_type_embeddings.weight"),
        *_both("embedding.norm", "bert.embeddings.LayerNorm"),
        _queries_keys_values("weight"),
        _queries_keys_values("bias"),
        *_both("layers.{}.attention.output", f"{_LAYER}.attention.output.dense"),
        *_both("layers.{}.attention_norm", f"{_LAYER}.attention.output.LayerNorm"),
        *_both("layers.{}.feed_forward.up", f"{_LAYER}.intermediate.dense"),
        *_both("layers.{}.feed_forward.down", f"{_LAYER}.output.dense"),
        *_both("layers.{}.feed_forward_norm", f"{_LAYER}.output.LayerNorm"),
        Line("head.weight", "cls.predictions.decoder.weight", VOCABULARY, untied),
        Line("head.bias", "cls.predictions.bias", VOCABULARY),
        *_both("head.transform.dense", "cls.predictions.transform.dense"),
        *_both("head.transform.norm", "cls.predictions.transform.LayerNorm"),
    ),
    fields={
        "num_hidden_layers": ("num_layers", 12),
        "hidden_size": ("hidden_size", 768),
        "num_attention_heads": ("attention.num_heads", 12),
        "intermediate_size": ("feed_forward.hidden_size", 3072),
        "vocab_size": ("vocab_size", 30522),
        "max_position_embeddings": ("max_seq_len", 512),
        "type_vocab_size": ("positions.num_token_types", 2),
        "layer_norm_eps": ("norm.eps", 1e-12),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
        "hidden_dropout_prob": ("dropout", 0.1),
        "attention_probs_dropout_prob": ("attention.dropout", 0.1),
    },
    fixed={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
)
