"""The configs of the runs that the reference is held against: few, and each with many features, as sections."""

from typing import Any

Sections = dict[str, dict[str, Any]]

VOCAB = 96  # of the data sets; no model has fewer tokens
CORPORA = {"large": 3000, "small": 1200, "held_out": 700}  # tokens

# Wide initial weights: attention is far from uniform, so its scale and positions count in the loss.
BASE: Sections = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": VOCAB, "max_seq_len": 64,
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
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden_size": 24,
    "num_shared_experts": 1,
    "expert_capacity": 0.8,
    "router_balance_loss": 0.3,
    "router_z_loss": 0.05,
    "router_scale": 1.5,
}
SIGMOID = {
    "num_experts": 8,
    "experts_per_token": 3,
    "expert_hidden_size": 16,
    "num_shared_experts": 2,
    "router_score": "sigmoid",
    "router_groups": 4,
    "router_groups_per_token": 2,
    "router_balance_loss": 0.3,
    "router_balance_rate": 0.05,
}
# both ends of the transition lie between two frequencies
YARN = {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_theta": 100.0, "rope_beta_fast": 3.0}
LONGROPE = {
    "rope_scaling": "longrope",
    "rope_scaling_factor": 4.0,
    "rope_original_max_seq_len": 16,
    "rope_short_factors": [1.0, 1.2, 1.5, 2.0],
    "rope_long_factors": [1.1, 1.7, 3.0, 4.0],
}
LLAMA3 = {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_max_seq_len": 32,
          "rope_theta": 100.0}  # fmt: skip

RUNS: dict[str, Sections] = {
    "gpt: adamw, cosine, masked documents, dropout, ramp, rules, clipping": {
        "model": {"family": "gpt", "dropout": 0.2, "attention_dropout": 0.3},
        "optimizer": {"rules": RULES, "weight_decay": 0.5, "grad_clip": 0.5, "beta2": 0.9},
        "schedule": {"warmup_steps": 3, "min_lr_ratio": 0.2, "decay_steps": 5},
        "data": {"sequences": "mask_documents"},
        "train": {"steps": 6, "eval_every": 2, "ramp": [{"until_step": 1, "global_batch_size": 8, "seq_len": 16},
                                                        {"until_step": 2, "global_batch_size": 4}]},
    },
    "llama: lion, linear, packed documents, grouped queries, llama3": {
        "model": {"family": "llama", "num_kv_heads": 2, "dropout": 0.1, **LLAMA3},
        "optimizer": {"name": "lion", "lr": 3e-3, "beta2": 0.8, "weight_decay": 1.0, "grad_clip": 0.0},
        "schedule": {"name": "linear", "warmup_steps": 1, "min_lr_ratio": 0.0},
        "data": {"sequences": "pack_documents"},
    },
    "llama: adafactor, inverse square root, two sources, tied": {
        "model": {"family": "llama", "tie_embeddings": True, "vocab_size": 104, "vocab_padding": 8, "num_kv_heads": 1},
        "optimizer": {"name": "adafactor", "lr": 3e-2, "rules": RULES[1:], "grad_clip": 10.0},
        "schedule": {"name": "inverse_sqrt", "warmup_steps": 2, "min_lr_ratio": 0.6},
        "data": {"eod_loss": False, "train": {"a": {"path": "large", "weight": "3/7"}, "b": {"path": "small"}},
                 "weigh_by": "tokens", "temperature": 2.0,
                 "weight_schedule": [{"from_sample": 20, "weights": {"a": "2"}}],
                 "validation": {"one": "held_out", "other": "small"}},
        "train": {"steps": 6, "activation_checkpointing": "full"},
    },
    "qwen3: muon, wsd, one document, yarn": {
        "model": {"family": "qwen3", "head_width": 12, "num_kv_heads": 2, "norm_eps": 1e-2, "attention_dropout": 0.2,
                  **YARN},
        "optimizer": {"name": "muon", "rules": RULES, "muon_momentum": 0.8, "grad_clip": 1.0, "weight_decay": 0.3},
        "schedule": {"name": "wsd", "warmup_steps": 2, "decay_steps": 3, "min_lr_ratio": 0.1},
        "data": {"sequences": "one_document"},
        "train": {"steps": 5},
    },
    "softmax mixture of llama: adamw, constant, eod loss in masks": {
        "model": {"family": "llama", "dropout": 0.1, "num_layers": 3, "num_dense_layers": 1, **SOFTMAX},
        "optimizer": {"weight_decay": 0.2, "grad_clip": 0.3},
        "schedule": {"name": "constant", "warmup_steps": 2},
        "data": {"sequences": "mask_documents", "eod_loss": True},
        "train": {"activation_checkpointing": "full", "ramp": [{"until_step": 2, "seq_len": 16,
                                                                "global_batch_size": 8}]},
    },
    "sigmoid mixture of gpt: muon, balance bias, groups": {
        "model": {"family": "gpt", **SIGMOID, "expert_interval": 2},
        "optimizer": {"name": "muon"},
        "schedule": {"warmup_steps": 1, "decay_steps": 6},
        "train": {"eval_every": 2},
    },
    "sigmoid mixture of qwen3: lion, gates as they are, packed documents, longrope": {
        "model": {"family": "qwen3", **LONGROPE, **SIGMOID, "router_normalize": False, "expert_capacity": 1.0,
                  "num_shared_experts": 0, "experts_per_token": 2},
        "optimizer": {"name": "lion", "lr": 2e-3},
        "data": {"sequences": "pack_documents"},
        "train": {"micro_batch_size": 4},
    },
    "llama: adamw, dynamic, documents by a kernel of their own": {
        "model": {"family": "llama", "attention_bias": True, "document_attention": "per_document",
                  "rope_scaling": "dynamic", "rope_scaling_factor": 3.0, "rope_original_max_seq_len": 16},
        "optimizer": {"eps": 1e-2, "beta1": 0.5, "rules": [{"pattern": "*.bias", "weight_decay": 0.2}]},
        "data": {"sequences": "mask_documents", "eod_loss": True},
        "train": {"steps": 3},
    },
    "llama: adamw, linear positions": {
        "model": {"family": "llama", "rope_scaling": "linear", "rope_scaling_factor": 2.0, "num_kv_heads": 2},
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
