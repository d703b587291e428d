"""The families of models: each is a choice of parts, by the config's keys below ``model``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FamilyName = Literal["bert", "gpt", "llama", "mistral", "qwen3"]


@dataclass(frozen=True)
class Family:
    """``about``: its parts in words. ``preset``: what the fields are set to that a config leaves open. ``also``: what
    others call it."""

    about: str
    preset: Mapping[str, Any]
    also: tuple[str, ...] = ()


_DECODER = {"norm.placement": "pre", "norm.embedding": False, "positions.num_token_types": 0, "head_transform": False}
_LLAMA = {
    **_DECODER,
    "blocks": ["full"],
    "positions.kind": "rotary",
    "norm.kind": "rms_norm",
    "attention.bias": False,
    "attention.head_norms": False,
    "feed_forward.activation": "swiglu",
    "feed_forward.bias": False,
    "tie_embeddings": False,
}
FAMILIES: dict[FamilyName, Family] = {
    "bert": Family(
        "an encoder: blocks that see both ways, learned positions, token types, LayerNorm behind each sublayer and the "
        "embeddings, exact GELU, biases, tied embeddings, a head with a layer of its own",
        {
            "blocks": ["bidirectional"],
            "positions.kind": "learned",
            "positions.num_token_types": 2,
            "norm.kind": "layer_norm",
            "norm.placement": "post",
            "norm.embedding": True,
            "attention.bias": True,
            "attention.head_norms": False,
            "feed_forward.activation": "gelu_erf",
            "feed_forward.bias": True,
            "tie_embeddings": True,
            "head_transform": True,
        },
    ),
    "gpt": Family(
        "learned positions, LayerNorm, GELU, biases, tied embeddings",
        {
            **_DECODER,
            "blocks": ["full"],
            "positions.kind": "learned",
            "norm.kind": "layer_norm",
            "attention.bias": True,
            "attention.head_norms": False,
            "feed_forward.activation": "gelu",
            "feed_forward.bias": True,
            "tie_embeddings": True,
        },
        also=("gpt2", "gpt-2"),
    ),
    "llama": Family("rotary positions, RMSNorm, SwiGLU, no biases, untied embeddings", _LLAMA),
    "mistral": Family("llama with sliding-window attention", {**_LLAMA, "blocks": ["window"]}),
    "qwen3": Family("llama with a norm on each head's queries and keys", {**_LLAMA, "attention.head_norms": True}),
}
ABOUT = " ".join(f"{name}: {family.about}." for name, family in FAMILIES.items())
