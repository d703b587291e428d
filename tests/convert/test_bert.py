"""BERT, both ways: the logits are transformers', weights keep their bits, and what has no place is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import newest_checkpoint
from megatrain.convert.errors import ConversionError
from megatrain.convert.formats import FORMATS, Choices
from megatrain.convert.run import Request, convert
from megatrain.convert.table import Weights
from megatrain.inference.generate import require_room
from megatrain.models.build import build_empty_model
from tests.convert.models import save_tokenizer

VOCAB, LENGTH = 131, 48


def save_bert(folder: Path) -> Path:
    """As BERT lies on the hub: with a pooler and a head for pairs of sentences; all weights are random."""
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=LENGTH, initializer_range=0.2, layer_norm_eps=1e-7,
    )  # fmt: skip
    model = transformers.BertForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder / "tokenizer.json")
    return folder


def our_logits(checkpoint: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, S, V] by the whole model here."""
    weights = Weights(FORMATS["megatrain"].read(checkpoint, Choices()))
    model = build_empty_model(weights.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read("weight", name))
        return model.to(dtype)(tokens).transpose(0, 1)[..., :VOCAB]


def test_bert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertForMaskedLM

    source = save_bert(tmp_path / "source")
    record = convert(Request(source, tmp_path / "run", "megatrain", longest=LENGTH, choices=Choices(vocab_multiple=8)))
    assert record["status"] == "verified" and record["model"]["vocab_padding"] == -VOCAB % 8
    told = capsys.readouterr().out
    assert "bert.pooler.dense.weight" in told and "cls.seq_relationship.weight stay behind: BertForMaskedLM" in told
    tokens = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    # logits up to 4, each the work of some 20 roundings of 2^-24 and 2^-53 of them: found 2.4e-6 and 5e-15
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        theirs = BertForMaskedLM.from_pretrained(source, dtype=dtype).eval()
        with torch.no_grad():
            error = our_logits(tmp_path / "run", tokens, dtype) - theirs(tokens).logits
        assert float(error.abs().max()) < bound

    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=r"see both ways .*can't go on with one"):
        require_room(CheckpointReader(checkpoint), [1])

    convert(Request(tmp_path / "run", tmp_path / "back", "huggingface", longest=LENGTH))
    there, back = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert set(there) - set(back) <= {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight",
        "cls.seq_relationship.bias", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
    }  # fmt: skip
    assert back.keys() <= there.keys() and all(torch.equal(there[name], back[name]) for name in back)
    again = BertForMaskedLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_older_names_copies_and_other_models(tmp_path: Path) -> None:
    """Norms with gamma and beta, and the head's rows and biases once more, are read; a base model has no head."""
    source = save_bert(tmp_path / "source")
    file = source / "model.safetensors"
    now = {name: tensor for name, tensor in load_file(file).items() if "pooler" not in name}
    words, bias = now["bert.embeddings.word_embeddings.weight"], now["cls.predictions.bias"]
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for name, t in now.items()}
    old |= {"cls.predictions.decoder.weight": words.clone(), "cls.predictions.decoder.bias": bias.clone()}
    old["bert.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(old, file, metadata={"format": "pt"})
    weights = Weights(FORMATS["huggingface"].read(source, Choices()))
    weights.require_complete()
    assert torch.equal(weights.read("weight", "embedding.norm.weight"), now["bert.embeddings.LayerNorm.weight"])
    save_file(old | {"cls.predictions.decoder.bias": bias + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"cls\.predictions\.decoder\.bias"):
        FORMATS["huggingface"].read(source, Choices())
    base = {name.removeprefix("bert."): t for name, t in now.items() if name.startswith("bert.")}
    save_file(base, file, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"missing: cls\.predictions\.bias"):
        Weights(FORMATS["huggingface"].read(source, Choices())).require_complete()


def test_a_causal_format_has_no_place_for_it(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "source")
    convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    with pytest.raises(ConversionError, match=r"GPT, .* has no place for model\.blocks bidirectional, .*placement"):
        convert(Request(tmp_path / "run", tmp_path / "megatron", "megatron", verify=False))
