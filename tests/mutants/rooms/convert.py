"""Mistakes in conversion: how tensors are arranged, which are which, what a config says, what optimizers keep."""

from tests.mutants.mutant import Mutant


def _m(file: str, old: str, new: str, kind: str, *see: str) -> Mutant:
    return Mutant(f"convert/{file}.py", old, new, kind, see)


_ROPE, _CONFIG, _TABLE, _STATES = "huggingface/rope", "huggingface/config", "table", "megatron/states"
_LLAMA, _GPT2, _MOE, _BIASES = "hf-llama", "hf-gpt2", "hf-moe", "hf-biases"
_MEGATRON, _OPTIMIZER = "megatron", "megatron-optimizer"

MUTANTS = [
    _m("forms", "torch.cat(parts, dim=1)", "torch.cat(parts, dim=0)", "wrong dim", _LLAMA),
    # arrangements
    _m(
        "forms",
        "_grouped(tensors[0].t().chunk(3), model)",
        "_grouped(tensors[0].t().chunk(3)[::-1], model)",
        "swapped",
        _GPT2,
    ),
    _m(
        "forms",
        "torch.cat(_ungrouped(tensors, model)).t()",
        "torch.cat(_ungrouped(tensors, model)[::-1]).t()",
        "swapped",
        _GPT2,
    ),
    _m(
        "forms",
        ".split([model.attention.num_heads // groups, 1, 1], dim=1)",
        ".split([1, 1, model.attention.num_heads // groups], dim=1)",
        "swapped",
        _LLAMA,
    ),
    _m("forms", "rows.new_zeros(model.vocab_padding", "rows.new_ones(model.vocab_padding", "wrong fill", _LLAMA),
    _m("forms", "[tensors[0][: num_tokens(model)]]", "[tensors[0][-num_tokens(model) :]]", "wrong end", _LLAMA),
    _m(
        "forms",
        "[matrix.t() for matrix in tensors[0]]",
        "[matrix.t() for matrix in tensors[0].flip(0)]",
        "wrong order",
        _MOE,
    ),
    _m("forms", "return list(tensors[0].chunk(2))", "return list(tensors[0].chunk(2))[::-1]", "swapped", _MEGATRON),
    _m("forms", "return [torch.cat(list(tensors))]", "return [torch.cat(list(tensors)[::-1])]", "swapped", _MEGATRON),
    _m(
        "forms",
        "list(tensors[0].transpose(1, 2).chunk(2, dim=2))",
        "list(tensors[0].transpose(1, 2).chunk(2, dim=2))[::-1]",
        "swapped",
        "megatron-moe",
    ),
    _m(
        "forms",
        "torch.cat(list(tensors), dim=2).transpose(1, 2)",
        "torch.cat(list(tensors)[::-1], dim=2).transpose(1, 2)",
        "swapped",
        "megatron-moe",
    ),
    # names
    _m(_TABLE, "return model.attention.bias", "return model.feed_forward.bias", "wrong condition", _BIASES),
    _m(_TABLE, "if layer not in mixture_layers(model)]", "if layer in mixture_layers(model)]", "wrong way", _MOE),
    _m(_TABLE, "return not model.tie_embeddings", "return True", "wrong condition", "hf-tied"),
    _m(
        _TABLE,
        "model.experts.num_experts > 0 and model.router.balance_rate > 0",
        "model.experts.num_experts > 0",
        "wrong condition",
        "native",
    ),
    _m(
        _TABLE,
        "self._last[0] != (kind, entry)",
        "self._last[0][1] != entry",
        "stale state",
        "native",
        _OPTIMIZER,
    ),
    _m(
        _TABLE,
        "for name in names for e in range(model.experts.num_experts))",
        "for name in names for e in reversed(range(model.experts.num_experts)))",
        "wrong order",
        _MOE,
    ),
    _m(
        _TABLE,
        'problems += [f"not known: {name}" for name in sorted(there - wanted)]',
        "pass",
        "dropped check",
        "hf-refused",
    ),
    _m(
        "megatron/names",
        '("layers.{}.feed_forward.gate.weight", "layers.{}.feed_forward.up.weight"),',
        '("layers.{}.feed_forward.up.weight", "layers.{}.feed_forward.gate.weight"),',
        "swapped",
        _MEGATRON,
    ),
    _m(
        "megatron/names",
        'Line("final_norm.bias", "decoder.final_layernorm.bias", when=_norm_biases)',
        'Line("final_norm.bias", "decoder.final_layernorm.bias", when=_gated)',
        "wrong condition",
        "megatron-gpt2",
    ),
    # what a config says
    _m(
        _ROPE,
        '        scaling["rope.original_max_seq_len"] = config[_ORIGINAL]\n',
        "        pass\n",
        "dropped",
        "other-side",
    ),
    _m(
        _ROPE,
        'length / (scaling["rope.original_max_seq_len"] or length)',
        "float(length)",
        "missing divisor",
        "hf-longrope",
    ),
    _m(_ROPE, "return numerator / denominator", "return denominator / numerator", "swapped", "hf-yarn-sizes"),
    _m(
        _ROPE,
        'int(length * scaling["rope.factor"])',
        "length",
        "missing factor",
        "hf-dynamic",
        "other-side",
    ),
    _m(_CONFIG, "max(dense) + 1", "max(dense)", "off by one", "hf-dense"),
    _m(
        _CONFIG,
        '-values["vocab_size"] % vocab_multiple',
        'values["vocab_size"] % vocab_multiple',
        "wrong sign",
        _LLAMA,
    ),
    # states
    _m("native", '"optimizer_steps": step', '"optimizer_steps": 0', "not kept", "native"),
    _m("native", 'if optimizer["name"] not in ("adamw", "cpu_adamw"):', "if True:", "not kept", "native"),
    _m(_STATES, "_DECAYS = (1.0, 0.0)", "_DECAYS = (0.0, 1.0)", "swapped", _OPTIMIZER),
    _m(
        _STATES,
        '"weight_decay": decay * factor, "step": step}',
        '"weight_decay": decay, "step": step}',
        "missing factor",
        _OPTIMIZER,
    ),
    _m(_STATES, "_DECAYS[:1], expert=True", "_DECAYS[:1], expert=False", "wrong mark", "megatron-spread"),
    _m(_STATES, '"state": {"common_step": step}', '"state": {"common_step": step * 0}', "not kept", _OPTIMIZER),
    _m(_STATES, '"step": step} for factor in', '"step": step + 1} for factor in', "off by one", "megatron-bf16"),
    # DeepSpeed's files
    _m(
        "deepspeed/names",
        "first.shape == whole:",
        "True:",
        "parts not joined",
        "deepspeed-tensor",
    ),
    _m(
        "deepspeed/experts",
        "first = expert_rank * (self._num_experts // num_expert_ranks)",
        "first = expert_rank",
        "wrong rank's part",
        "deepspeed-experts",
    ),
]
