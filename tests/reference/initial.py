"""Names and shapes of all weights, and what they begin with.

Shapes: V vocabulary, D width, H query and G key/value heads of width K, F feed-forward width, E experts.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor


def mixture_blocks(model: dict[str, Any]) -> list[int]:
    """Blocks with experts: after the dense ones, the last of every ``expert_interval`` blocks."""
    if not model["experts.num_experts"]:
        return []
    blocks, every = range(model["experts.num_dense_layers"], model["num_layers"]), model["experts.interval"]
    return [block for block in blocks if (block + 1) % every == 0]


def shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight's shape by canonical name; ``model``: that section of a resolved config."""
    V, D, gpt = model["vocab_size"], model["hidden_size"], model["family"] == "gpt"
    found: dict[str, tuple[int, ...]] = {"embedding.word.weight": (V, D)}
    if gpt:
        found["embedding.position.weight"] = model["max_seq_len"], D
    for number in range(model["num_layers"]):
        for name, shape in _block(model, number in mixture_blocks(model)).items():
            found[f"layers.{number}.{name}"] = shape
    found |= _norm("final_norm", D, gpt)
    return found if model["tie_embeddings"] else found | {"head.weight": (V, D)}


def _block(model: dict[str, Any], mixture: bool) -> dict[str, tuple[int, ...]]:
    D, H, G, K = (
        model[key] for key in ("hidden_size", "attention.num_heads", "attention.num_kv_heads", "attention.head_width")
    )
    gpt, bias = model["family"] == "gpt", model["attention.bias"]
    found = _norm("attention_norm", D, gpt) | _norm("feed_forward_norm", D, gpt)
    found |= _linear("attention.query_key_value", D, (H + 2 * G) * K, bias) | _linear(
        "attention.output", H * K, D, bias
    )
    if model["family"] == "qwen3":
        found |= {"attention.query_norm.weight": (K,), "attention.key_norm.weight": (K,)}
    if not mixture:
        return found | _feed_forward("feed_forward", D, model["feed_forward.hidden_size"], gpt)
    E, F = model["experts.num_experts"], model["experts.hidden_size"] or model["feed_forward.hidden_size"]
    found |= {"feed_forward.router.weight": (E, D), "feed_forward.experts.down": (E, F, D)}
    for name in ("up",) if gpt else ("up", "gate"):
        found[f"feed_forward.experts.{name}"] = E, D, F
    if model["experts.num_shared"]:
        found |= _feed_forward("feed_forward.shared", D, F * model["experts.num_shared"], gpt)
    return found


def _norm(name: str, width: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _feed_forward(name: str, D: int, F: int, gpt: bool) -> dict[str, tuple[int, ...]]:
    gate = {} if gpt else _linear(f"{name}.gate", D, F, False)
    return _linear(f"{name}.up", D, F, gpt) | _linear(f"{name}.down", F, D, gpt) | gate


def initial_weights(model: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """GPT-2's distribution (Radford et al. 2019): what ends a residual branch is smaller by sqrt(2 L).

    Drawn as docs/parity.md says: torch's generator for normal numbers, seeded by SHA-256 of "SEED/NAME".
    """
    found = {}
    for name, shape in shapes(model).items():
        if name.endswith(".bias"):
            found[name] = torch.zeros(shape, dtype=torch.float64)
        elif "norm" in name:
            found[name] = torch.ones(shape, dtype=torch.float64)
        else:
            ends_branch = name.endswith(("output.weight", "down.weight", "experts.down"))
            std = model["init_std"] / (math.sqrt(2 * model["num_layers"]) if ends_branch else 1)
            word = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
            normal = torch.randn(shape, generator=torch.Generator().manual_seed(word // 2))
            found[name] = (normal * std).double()  # rounded to FP32, as a run begins
    return found
