"""The other side of a proof is the model that transformers loads; what it reads in another way never passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.convert.errors import ConversionError, ProofFailed
from megatrain.convert.huggingface import rope as hf_rope
from megatrain.convert.run import Request, convert
from tests.convert.models import LINEAR, LONGROPE, save_model
from tests.convert.test_huggingface import LOGITS, logits


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def test_a_tied_head_that_is_none_is_refused(tmp_path: Path) -> None:
    source = save_model("llama-tied-linear", tmp_path / "source")
    head = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(source, **{"lm_head.weight": head.clone()})
    assert convert(Request(source, tmp_path / "copy", "megatrain", longest=32))["status"] == "verified"
    change_tensors(source, **{"lm_head.weight": head.flip(0).clone()})
    with pytest.raises(ConversionError, match=r"lm_head.weight is not the word embedding, which tie_word_embeddings"):
        convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    change_config(source, tie_word_embeddings=False)
    assert convert(Request(source, tmp_path / "run", "megatrain", longest=32))["status"] == "verified"


def test_an_original_length_at_the_top_level_counts(tmp_path: Path) -> None:
    """As transformers has it: before the one of the scaling."""
    source = save_model("llama-longrope", tmp_path / "source")
    change_config(source, original_max_position_embeddings=48)
    record = convert(Request(source, tmp_path / "run", "megatrain", longest=32))
    assert record["model"]["rope"]["original_max_seq_len"] == 48
    tokens = torch.arange(1, 131)[None, :90]
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    assert float((logits(tmp_path / "run", tokens) - theirs).abs().max()) < LOGITS


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_few_proof_tokens_still_pass_the_length_at_which_frequencies_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A reader that takes the wrong frequencies for long sequences; 8 tokens are asked for, 64 would not show it."""
    source = save_model(f"llama-{kind}", tmp_path / "source")
    if kind == "longrope":
        change_config(source, rope_parameters=LONGROPE | {"original_max_position_embeddings": 72, "factor": 4.0})
        right = hf_rope.rope_from_config
        monkeypatch.setattr(
            "megatrain.convert.huggingface.config.rope_from_config",
            lambda *given: (values := right(*given)) | {"rope.long_factors": values["rope.short_factors"]},
        )
    else:
        change_config(source, max_position_embeddings=72)
        right = hf_rope.rope_from_config
        monkeypatch.setattr(
            "megatrain.convert.huggingface.config.rope_from_config",
            lambda *given: right(*given) | {"rope.factor": 2.0},
        )
    with pytest.raises(ProofFailed, match="logits differ by"):
        convert(Request(source, tmp_path / "run", "megatrain", longest=8))


def test_what_transformers_does_not_load_is_no_proof(tmp_path: Path) -> None:
    source = save_model("llama2", tmp_path / "source")
    change_config(source, pad_token_id=1000)
    with pytest.raises(ProofFailed, match=r"transformers does not load .*source"):
        convert(Request(source, tmp_path / "run", "megatrain", longest=8))


ACCEPTED: dict[str, dict[str, Any]] = {
    "linear with an original length": {"rope_parameters": LINEAR | {"original_max_position_embeddings": 24}},
    "partial_rotary_factor 1": {
        "rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 1.0,
    },
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "truncate": True,
                            "finetuned": True, "beta_fast": None, "original_max_position_embeddings": 24},
    },
    "attn_implementation": {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantization": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: the weights are quant"),
    "truncate": (
        {"rope_parameters": LINEAR | {"rope_type": "yarn", "truncate": False}}, "truncate = False of YaRN is not",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not computed here"),
    "layer types": ({"layer_types": ["sliding_attention"] * 3}, "layer_types = .*'full_attention' in every block"),
}  # fmt: skip


def test_settings_are_taken_where_they_mean_what_is_computed(tmp_path: Path) -> None:
    source = save_model("llama2", tmp_path / "source")
    config = (source / "config.json").read_text()
    for name, values in ACCEPTED.items():
        (source / "config.json").write_text(config)
        change_config(source, **values)
        record = convert(Request(source, tmp_path / name.replace(" ", "-"), "megatrain", longest=96))
        assert record["status"] == "verified", name
    for values, message in REFUSED.values():
        (source / "config.json").write_text(config)
        change_config(source, **values)
        with pytest.raises(ConversionError, match=message):
            convert(Request(source, tmp_path / "run", "megatrain", longest=96))
    (source / "config.json").write_text(config)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="the folder holds an adapter: merge it"):
        convert(Request(source, tmp_path / "run", "megatrain", longest=96))


def test_rounded_weights_are_not_called_equal(tmp_path: Path) -> None:
    """Sixty-four bits do not fit into thirty-two; those that do are not counted."""
    source = save_model("llama2", tmp_path / "source")
    found = load_file(source / "model.safetensors")
    wide = {name: tensor.double() for name, tensor in found.items()}
    wide["model.norm.weight"] = wide["model.norm.weight"] + 1e-12
    save_file(wide, source / "model.safetensors", metadata={"format": "pt"})
    proof = convert(Request(source, tmp_path / "run", "megatrain", longest=32))["proof"]
    assert proof["num_rounded"] == 1
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in found.items()}, source / "model.safetensors")
    with pytest.raises(ConversionError, match="is of type F8_E4M3; read are F32, BF16, F16, F64"):
        convert(Request(source, tmp_path / "again", "megatrain", longest=32))


def test_a_bias_that_megatron_core_has_not_is_refused(tmp_path: Path) -> None:
    source = save_model("llama-biases-yarn", tmp_path / "source")
    with pytest.raises(ConversionError, match=r"Megatron-core has no model with biases in the attention and none in"):
        convert(Request(source, tmp_path / "megatron", "megatron", verify=False))
