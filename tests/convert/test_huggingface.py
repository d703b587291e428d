"""Hugging Face's format both ways, for every family; transformers loads what comes out, as it is."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.convert.errors import ConversionError
from megatrain.convert.formats import FORMATS, Choices
from megatrain.convert.megatron.names import MEGATRON_CORE
from megatrain.convert.run import Request, convert
from megatrain.convert.runners import OwnRunner
from megatrain.convert.table import Weights, require_lines
from tests.configs import model_spec
from tests.convert.models import MODELS, VOCAB_SIZE, save_model

TINY = 96  # longest sequence of the proofs: all positions that the models have
LOGITS = 1e-4  # FP32 sums in another order


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[B, S, V] of tokens [B, S], by the model here."""
    runner = OwnRunner(Weights(FORMATS["megatrain"].read(run, Choices())), torch.float32)
    list(runner.activations([tokens]))
    return torch.cat(list(runner.logits())).unflatten(0, tuple(tokens.shape))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_equal(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = save_model(name, tmp_path / "source")
    record = convert(Request(source, tmp_path / "run", "megatrain", longest=TINY, choices=Choices(vocab_multiple=8)))
    assert record["status"] == "verified" and record["model"]["vocab_padding"] == -VOCAB_SIZE % 8
    embedding = FORMATS["megatrain"].read(tmp_path / "run", Choices()).read("weight", "embedding.word.weight")
    assert embedding[:VOCAB_SIZE].all() and not embedding[VOCAB_SIZE:].any(), "rows of padding are zeros"
    convert(
        Request(tmp_path / "run", tmp_path / "back", "huggingface", longest=TINY, choices=Choices(shard_bytes=9000))
    )
    there, back = tensors(source), tensors(tmp_path / "back")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[key], back[key]) for key in there)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file(), "it was sharded"
    assert json.loads((tmp_path / "back" / "conversion.json").read_text())["status"] == "verified"
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    tokens = torch.randint(0, VOCAB_SIZE, (2, TINY), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = other(tokens).logits
        assert torch.equal(one(tokens).logits, theirs)
    assert float((logits(tmp_path / "run", tokens) - theirs).abs().max()) < LOGITS, "the whole model, as users open it"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    prompt = tokenizer("def f(x):", return_tensors="pt")
    assert other.generate(prompt["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 3


def test_bfloat16_is_rounded_once_and_proved(tmp_path: Path) -> None:
    source = save_model("qwen3", tmp_path / "source")
    convert(Request(source, tmp_path / "run", "megatrain", longest=TINY))
    choices = Choices(dtype=torch.bfloat16)
    record = convert(Request(tmp_path / "run", tmp_path / "back", "huggingface", longest=TINY, choices=choices))
    assert record["dtype"] == "bfloat16"
    there, back = tensors(source), tensors(tmp_path / "back")
    assert all(torch.equal(there[key].bfloat16(), back[key]) for key in there)
    second = convert(Request(tmp_path / "back", tmp_path / "again", "megatrain", longest=TINY))
    assert second["status"] == "verified"


def test_a_tokenizer_file_becomes_a_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = save_model("llama3", tmp_path / "source")
    convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    choices = Choices(tokenizer=source / "tokenizer.json")
    record = convert(Request(tmp_path / "run", tmp_path / "back", "huggingface", longest=TINY, choices=choices))
    assert record["proof"]["num_tokens"] == 4 * 64 + 2 * TINY, "real text was run as well"
    assert AutoTokenizer.from_pretrained(tmp_path / "back").eos_token == "<|endoftext|>"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 0


def test_without_a_proof_the_record_says_so(tmp_path: Path) -> None:
    source = save_model("llama2", tmp_path / "source")
    record = convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    assert record["status"] == "not verified (--no-verify)"
    assert json.loads((tmp_path / "run" / "conversion.json").read_text())["status"] == record["status"]


def test_older_files_are_read(tmp_path: Path) -> None:
    """As GPT-2 lies on the hub: no prefix, masks beside the weights; and Llama with the RoPE fields of version 4."""
    source = save_model("gpt2", tmp_path / "gpt2")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors(source).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(Request(source, tmp_path / "a", "megatrain", longest=TINY))["status"] == "verified"
    source = save_model("llama3", tmp_path / "llama")
    config = json.loads((source / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (source / "config.json").write_text(json.dumps(config))
    assert convert(Request(source, tmp_path / "b", "megatrain", longest=TINY))["status"] == "verified"


def test_files_of_pickled_tensors_are_read_on_request(tmp_path: Path) -> None:
    """One ``pytorch_model.bin``, or shards; in today's format and in that of before PyTorch 1.6."""
    source = save_model("llama2", tmp_path / "source")
    there, trust = tensors(source), Choices(trust_pickle=True)
    (source / "model.safetensors").unlink()
    torch.save(there, source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin is a pickle, .* --trust-pickle"):
        convert(Request(source, tmp_path / "a", "megatrain"))
    assert convert(Request(source, tmp_path / "a", "megatrain", longest=32, choices=trust))["status"] == "verified"
    (source / "pytorch_model.bin").unlink()
    names = sorted(there)
    shards = {"one.bin": names[:9], "two.bin": names[9:]}
    for file, inside in shards.items():
        torch.save({n: there[n] for n in inside}, source / file, _use_new_zipfile_serialization=file == "one.bin")
    index = {"metadata": {}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert convert(Request(source, tmp_path / "b", "megatrain", longest=32, choices=trust))["status"] == "verified"
    torch.save({"model.norm.weight": Fraction(1, 2)}, source / "two.bin")  # no path: megatron-core lets those pass
    with pytest.raises(ConversionError, match=r"two.bin holds more than tensors and is not opened"):
        convert(Request(source, tmp_path / "c", "megatrain", choices=trust))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5' is not known; these are: bert, gpt2, llama"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "hidden_act = 'gelu' is not computed here; .*mlp_bias = True"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "RoPE scaling 'proportional' is not computed"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": "much", "mscale_all_dim": 1.0}},
            "mscale and mscale_all_dim of YaRN: could not convert",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "truncate": False}},
            "truncate = False of YaRN is not computed here",
        ),
        ({"num_hidden_layers": 4}, r"missing: model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, r"not known: model.layers.2.input_layernorm.weight"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"num_key_value_heads": 4}, "self_attn.q_proj.weight.*of shape"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_model_that_is_not_what_its_config_says_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    source = save_model("llama-tied-linear", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConversionError, match=message):
        convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is left behind"


def test_a_format_without_room_for_a_parameter_refuses_the_model() -> None:
    """Megatron-core's shared experts have no biases, and its mixtures no GELU experts without a gate."""
    values = {"family": "gpt", "num_layers": 2, "hidden_size": 32, "attention.num_heads": 4, "experts.num_experts": 2}
    with pytest.raises(ConversionError, match=r"no place for 8 of the model's parameters, like layers\.0\.feed"):
        require_lines(MEGATRON_CORE, model_spec(values))


def test_dense_blocks_between_others_are_refused(tmp_path: Path) -> None:
    source = save_model("qwen3-moe", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [1]}))
    with pytest.raises(ConversionError, match=r"mlp_only_layers = \[1\]: blocks without experts are computed"):
        convert(Request(source, tmp_path / "run", "megatrain", verify=False))


def test_a_target_that_is_there_is_left_alone(tmp_path: Path) -> None:
    source = save_model("llama2", tmp_path / "source")
    (tmp_path / "run").mkdir()
    with pytest.raises(ConversionError, match="run is there already"):
        convert(Request(source, tmp_path / "run", "megatrain"))
    with pytest.raises(ConversionError, match="nothing does not exist"):
        convert(Request(tmp_path / "nothing", tmp_path / "new", "megatrain"))
    with pytest.raises(ConversionError, match="in the format huggingface already"):
        convert(Request(source, tmp_path / "new", "huggingface"))


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    source = save_model("llama2", tmp_path / "source", max_shard_size="20KB")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="outside its folder"):
        convert(Request(source, tmp_path / "run", "megatrain"))
