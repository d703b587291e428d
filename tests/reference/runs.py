"""The configs of the runs that the reference is held against: few, and each with many features, as sections."""

from typing import Any

Sections = dict[str, dict[str, Any]]

VOCAB = 96  # of the data sets; no model has fewer tokens
CORPORA = {"large": 3000, "small": 1200, "held_out": 700}  # tokens

# Wide initial weights: attention is far from uniform, so its scale and positions count in the loss.
BASE: Sections = {
    "model": {"num_layers": 2, "hidden_size": 32, "attention.num_heads": 4, "vocab_size": VOCAB, "max_seq_len": 64,
              "init_std": 0.15},
    "precision": {"dtype": "fp32"},
    "parallel": {"zero_stage": 0},
    "optimizer": {"lr": 1e-2},
    "data": {"seq_len": 32, "seed": 5, "train": "large", "validation": "held_out"},
    "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "log_every": 1, "eval_batches": 2, "seed": 7},
    "checkpoint": {"background": False},
}  # fmt: skip
EPSILON = 1e-3
"""Large: a step is then smooth in a gradient near zero, of which rounding would make a whole step's length."""
RULES = [
    {"pattern": "embedding.*", "lr_scale": 0.5, "weight_decay": 0.0},
    {"pattern": "layers.1.*norm*", "lr_scale": 2.0, "weight_decay": 0.3},
    {"pattern": "layers.*.attention.output.weight", "lr_scale": 0.25, "weight_decay": 1.0},
]
SOFTMAX = {
    "experts.num_experts": 4,
    "experts.per_token": 2,
    "experts.hidden_size": 24,
    "experts.num_shared": 1,
    "experts.capacity": 0.8,
    "router.balance_loss": 0.3,
    "router.z_loss": 0.05,
    "router.scale": 1.5,
}
SIGMOID = {
    "experts.num_experts": 8,
    "experts.per_token": 3,
    "experts.hidden_size": 16,
    "experts.num_shared": 2,
    "router.score": "sigmoid",
    "router.groups": 4,
    "router.groups_per_token": 2,
    "router.balance_loss": 0.3,
    "router.balance_rate": 0.05,
}
# both ends of the transition lie between two frequencies
YARN = {"rope.scaling": "yarn", "rope.factor": 4.0, "rope.theta": 100.0, "rope.beta_fast": 3.0}
LONGROPE = {
    "rope.scaling": "longrope",
    "rope.factor": 4.0,
    "rope.original_max_seq_len": 16,
    "rope.short_factors": [1.0, 1.2, 1.5, 2.0],
    "rope.long_factors": [1.1, 1.7, 3.0, 4.0],
}
LLAMA3 = {"rope.scaling": "llama3", "rope.factor": 8.0, "rope.original_max_seq_len": 32,
          "rope.theta": 100.0}  # fmt: skip

RUNS: dict[str, Sections] = {
    "gpt: adamw, cosine, masked documents, dropout, ramp, rules, clipping": {
        "model": {"family": "gpt", "dropout": 0.2, "attention.dropout": 0.3},
        "optimizer": {"rules": RULES, "weight_decay": 0.5, "grad_clip": 0.5, "beta2": 0.9},
        "schedule": {"warmup_steps": 3, "min_lr_ratio": 0.2, "decay_steps": 5},
        "data": {"sequences": "mask_documents"},
        "train": {"steps": 6, "eval_every": 2, "ramp": [{"until_step": 1, "global_batch_size": 8, "seq_len": 16},
                                                        {"until_step": 2, "global_batch_size": 4}]},
    },
    "llama: lion, linear, packed documents, grouped queries, llama3": {
        "model": {"family": "llama", "attention.num_kv_heads": 2, "dropout": 0.1, **LLAMA3},
        "optimizer": {"name": "lion", "lr": 3e-3, "beta2": 0.8, "weight_decay": 1.0, "grad_clip": 0.0},
        "schedule": {"name": "linear", "warmup_steps": 1, "min_lr_ratio": 0.0},
        "data": {"sequences": "pack_documents"},
    },
    "llama: adafactor, inverse square root, two sources, tied": {
        "model": {"family": "llama", "tie_embeddings": True, "vocab_size": 104, "vocab_padding": 8,
                  "attention.num_kv_heads": 1},
        "optimizer": {"name": "adafactor", "lr": 3e-2, "rules": RULES[1:], "grad_clip": 10.0},
        "schedule": {"name": "inverse_sqrt", "warmup_steps": 2, "min_lr_ratio": 0.6},
        "data": {"eod_loss": False, "train": {"a": {"path": "large", "weight": "3/7"}, "b": {"path": "small"}},
                 "weigh_by": "tokens", "temperature": 2.0,
                 "weight_schedule": [{"from_sample": 20, "weights": {"a": "2"}}],
                 "validation": {"one": "held_out", "other": "small"}},
        "train": {"steps": 6, "activation_checkpointing": "full"},
    },
    "qwen3: muon, wsd, one document, yarn": {
        "model": {"family": "qwen3", "attention.head_width": 12, "attention.num_kv_heads": 2, "norm.eps": 1e-2,
                  "attention.dropout": 0.2, **YARN},
        "optimizer": {"name": "muon", "rules": RULES, "muon_momentum": 0.8, "grad_clip": 1.0, "weight_decay": 0.3},
        "schedule": {"name": "wsd", "warmup_steps": 2, "decay_steps": 3, "min_lr_ratio": 0.1},
        "data": {"sequences": "one_document"},
        "train": {"steps": 5},
    },
    "softmax mixture of llama: adamw, constant, eod loss in masks": {
        "model": {"family": "llama", "dropout": 0.1, "num_layers": 3, "experts.num_dense_layers": 1, **SOFTMAX},
        "optimizer": {"weight_decay": 0.2, "grad_clip": 0.3},
        "schedule": {"name": "constant", "warmup_steps": 2},
        "data": {"sequences": "mask_documents", "eod_loss": True},
        "train": {"activation_checkpointing": "full", "ramp": [{"until_step": 2, "seq_len": 16,
                                                                "global_batch_size": 8}]},
    },
    "sigmoid mixture of gpt: muon, balance bias, groups": {
        "model": {"family": "gpt", **SIGMOID, "experts.interval": 2},
        "optimizer": {"name": "muon"},
        "schedule": {"warmup_steps": 1, "decay_steps": 6},
        "train": {"eval_every": 2},
    },
    "sigmoid mixture of qwen3: lion, gates as they are, packed documents, longrope": {
        "model": {"family": "qwen3", **LONGROPE, **SIGMOID, "router.normalize": False, "experts.capacity": 1.0,
                  "experts.num_shared": 0, "experts.per_token": 2},
        "optimizer": {"name": "lion", "lr": 2e-3},
        "data": {"sequences": "pack_documents"},
        "train": {"micro_batch_size": 4},
    },
    "llama: adamw, dynamic, documents by a kernel of their own": {
        "model": {"family": "llama", "attention.bias": True, "attention.documents": "per_document",
                  "rope.scaling": "dynamic", "rope.factor": 3.0, "rope.original_max_seq_len": 16},
        "optimizer": {"eps": 1e-2, "beta1": 0.5, "rules": [{"pattern": "*.bias", "weight_decay": 0.2}]},
        "data": {"sequences": "mask_documents", "eod_loss": True},
        "train": {"steps": 3},
    },
    "llama: adamw, linear positions, windows": {
        "model": {"family": "llama", "rope.scaling": "linear", "rope.factor": 2.0, "attention.num_kv_heads": 2,
                  "blocks": ["window", "full"], "attention.window": 7},
        "train": {"steps": 2, "eval_batches": 1},
    },
}  # fmt: skip

STOPS = {
    "gpt: adamw, cosine, masked documents, dropout, ramp, rules, clipping": 3,
    "llama: adafactor, inverse square root, two sources, tied": 4,
    "sigmoid mixture of gpt: muon, balance bias, groups": 1,
}
"""Runs of two starts, the second of which goes on behind this step. Their rates don't depend on the number of steps."""


def sections_of(run: Sections, corpora: dict[str, str]) -> dict[str, Any]:
    """The config of a run over ``corpora``, folders by name."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(part) for key, part in value.items()}
        return corpora.get(value, value) if isinstance(value, str) else value

    merged = {section: {**BASE.get(section, {}), **run.get(section, {})} for section in {**BASE, **run}}
    if merged["optimizer"].get("name", "adamw") in ("adamw", "muon"):  # the others have none
        merged["optimizer"] = {"eps": EPSILON, **merged["optimizer"]}
    return {**merged, "data": placed(merged["data"])}
