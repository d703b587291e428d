"""Tiny models of every family, made by transformers from a config, and a tokenizer for them."""

import json
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 131
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,  # so that every layer matters in the logits
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
    "original_max_position_embeddings": 24,
}
# two with a factor of their own on cosine and sine
YARN_FACTOR, LONGROPE_FACTOR = ({**scaling, "attention_factor": 1.4} for scaling in (YARN, LONGROPE))
YARN_SIZES = {**YARN, "factor": None, "mscale": 0.7, "mscale_all_dim": 1.3}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

# name -> (config class, what it adds to the sizes)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96,
         "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-tied-linear": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "llama-biases-yarn": ("LlamaConfig", {"attention_bias": True, "head_dim": 12, "rope_parameters": YARN}),
    "llama-yarn-sizes": ("LlamaConfig", {"rope_parameters": YARN_SIZES}),
    "llama-dynamic": ("LlamaConfig", {"max_position_embeddings": 24, "rope_parameters": DYNAMIC}),
    "llama-longrope": ("LlamaConfig", {"rope_parameters": LONGROPE}),
    "llama-longrope-factor": ("LlamaConfig", {"rope_parameters": LONGROPE_FACTOR}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "head_dim": 12}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "rms_norm_eps": 1e-5}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "norm_topk_prob": False},
    ),
    "qwen3-moe-dense": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 4,
         "norm_topk_prob": True, "mlp_only_layers": [0, 1], "decoder_sparse_step": 2},
    ),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": YARN_FACTOR}),
}  # fmt: skip


def save_model(name: str, folder: Path, tokens: int = VOCAB_SIZE, **options: Any) -> Path:
    """Saves a random model with its tokenizer as transformers saves it; norms and biases are random too."""
    import transformers

    class_name, extra = MODELS[name]
    values = extra if name == "gpt2" else {**_SIZES, "bos_token_id": 0, "eos_token_id": 0, **extra}
    values = {**values, "vocab_size": tokens}
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    save_tokenizer(folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_tokenizer(path: Path) -> Path:
    """A tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = ["<|endoftext|>", "?", *(chr(code) for code in range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(dict.fromkeys(characters))}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path
