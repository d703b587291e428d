"""Megatron-core's torch_dist both ways: its own dist_checkpointing loads ours, we load what it saved, same logits."""

import pickle
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.formats import FORMATS, Choices
from megatrain.checkpoint.convert.run import Request, convert
from megatrain.checkpoint.convert.runners import own_runner
from megatrain.checkpoint.convert.table import Weights
from megatrain.config.derive import resolve_model
from megatrain.config.schema import ModelConfig
from tests.checkpoint.convert.megatron_model import load_and_run, save_and_run
from tests.checkpoint.convert.models import save_model
from tests.pool import Pool

TRUST = Choices(trust_pickle=True)
TOKENS = torch.randint(0, 128, (2, 96), generator=torch.Generator().manual_seed(1))
# FP32 against another program's attention and norms
LOGITS = 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen3"])
def test_megatron_core_loads_and_computes_the_same(pool: Pool, tmp_path: Path, name: str) -> None:
    source = save_model(name, tmp_path / "source")
    convert(Request(source, tmp_path / "run", "megatrain", longest=96, choices=Choices(vocab_multiple=8)))
    record = convert(Request(tmp_path / "run", tmp_path / "megatron", "megatron", longest=96))
    assert record["status"] == "verified"
    model = ModelConfig.model_validate(record["model"])
    (logits,) = pool.run(load_and_run, 1, str(tmp_path / "megatron" / "iter_0000000"), model, TOKENS)
    ours = own_runner(Weights(FORMATS["megatrain"].read(tmp_path / "run", Choices())), torch.float32).logits(TOKENS)
    assert float((logits[..., : ours.shape[-1]] - ours).abs().max()) < LOGITS
    back = Request(tmp_path / "megatron", tmp_path / "back", "megatrain", longest=96, choices=TRUST)
    assert convert(back)["status"] == "verified"


@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3"])
def test_what_megatron_core_saved_is_read(pool: Pool, tmp_path: Path, name: str) -> None:
    model = resolve_model(
        ModelConfig.model_validate(
            {"family": name, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 128, "max_seq_len": 96}
            | ({} if name == "gpt" else {"num_kv_heads": 2})
        )
    )
    folder = tmp_path / "iter_0000007"
    (logits,) = pool.run(save_and_run, 1, str(folder), model, TOKENS)
    (tmp_path / "my.yaml").write_text("model: " + model.model_dump_json())
    choices = Choices(trust_pickle=True, model_file=tmp_path / "my.yaml")
    convert(Request(folder, tmp_path / "run", "megatrain", longest=96, choices=choices))
    reader = FORMATS["megatrain"].read(tmp_path / "run", Choices())
    assert reader.step == 7
    assert float((own_runner(Weights(reader), torch.float32).logits(TOKENS) - logits).abs().max()) < LOGITS


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    source = save_model("llama2", tmp_path / "source")
    convert(Request(source, tmp_path / "megatron", "megatron", verify=False))
    return tmp_path / "megatron"


def test_a_pickle_is_opened_only_on_request(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ConversionError, match=r"is a pickle, which can run any code .* --trust-pickle"):
        convert(Request(exported, tmp_path / "run", "megatrain"))


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_code_in_the_metadata_does_not_run_even_when_trusted(tmp_path: Path, exported: Path) -> None:
    folder = exported / "iter_0000000"
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ConversionError, match="is not known here"):
        convert(Request(exported, tmp_path / "run", "megatrain", choices=TRUST))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_piece_is_named(tmp_path: Path, exported: Path) -> None:
    data = exported / "iter_0000000" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:20000])
    with pytest.raises(ConversionError, match=r"decoder\.layers\..* at \("):
        convert(Request(exported, tmp_path / "run", "megatrain", choices=TRUST))


def test_without_a_model_file_the_cure_is_named(tmp_path: Path, exported: Path) -> None:
    (exported / "model.yaml").unlink()
    with pytest.raises(ConversionError, match=r"model\.yaml is missing: --model names"):
        convert(Request(exported, tmp_path / "run", "megatrain", choices=TRUST))
