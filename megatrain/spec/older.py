"""What older versions wrote: the keys of version 0.1, whose section ``model`` was one flat list."""

from collections.abc import Mapping
from typing import Any

from megatrain.spec.keys import nested

NEW_KEYS = {
    "num_heads": "attention.num_heads",
    "num_kv_heads": "attention.num_kv_heads",
    "head_width": "attention.head_width",
    "attention_bias": "attention.bias",
    "attention_dropout": "attention.dropout",
    "document_attention": "attention.documents",
    "ffn_hidden_size": "feed_forward.hidden_size",
    "norm_eps": "norm.eps",
    "rope_theta": "rope.theta",
    "rope_scaling": "rope.scaling",
    "rope_scaling_factor": "rope.factor",
    "rope_original_max_seq_len": "rope.original_max_seq_len",
    "rope_short_factors": "rope.short_factors",
    "rope_long_factors": "rope.long_factors",
    "rope_low_freq_factor": "rope.low_freq_factor",
    "rope_high_freq_factor": "rope.high_freq_factor",
    "rope_beta_fast": "rope.beta_fast",
    "rope_beta_slow": "rope.beta_slow",
    "rope_attention_factor": "rope.attention_factor",
    "num_experts": "experts.num_experts",
    "experts_per_token": "experts.per_token",
    "expert_hidden_size": "experts.hidden_size",
    "num_shared_experts": "experts.num_shared",
    "num_dense_layers": "experts.num_dense_layers",
    "expert_interval": "experts.interval",
    "expert_capacity": "experts.capacity",
    "router_score": "router.score",
    "router_normalize": "router.normalize",
    "router_scale": "router.scale",
    "router_groups": "router.groups",
    "router_groups_per_token": "router.groups_per_token",
    "router_balance_loss": "router.balance_loss",
    "router_z_loss": "router.z_loss",
    "router_balance_rate": "router.balance_rate",
}
"""Key below ``model`` of version 0.1 -> of this one."""


def of_this_version(model: Any) -> Any:
    """A section ``model`` of any version, in the keys of this one; what is no section stays what it is."""
    if not isinstance(model, Mapping) or not model.keys() & NEW_KEYS.keys():
        return model
    fields = {NEW_KEYS.get(str(name), str(name)): value for name, value in model.items()}
    if "experts.num_experts" in fields:  # a dense model had none
        fields["experts.num_experts"] = fields["experts.num_experts"] or 0
    return nested(fields)
