"""Megatron-core's torch_dist both ways: its own dist_checkpointing loads ours, we load what it saved, same logits."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.convert.errors import ConversionError
from megatrain.convert.formats import FORMATS, Choices
from megatrain.convert.megatron.torch_dist import TorchDistReader
from megatrain.convert.run import Request, convert
from megatrain.convert.runners import OwnRunner
from megatrain.convert.table import Reader, Weights
from megatrain.spec.schema import ModelSpec
from tests.checkpoint.payload import Payload
from tests.configs import model_spec
from tests.convert.megatron_model import load_and_run, save_and_run
from tests.convert.megatron_training import OptimizerKind, load_and_save, train_and_save
from tests.convert.models import save_model
from tests.pool import Pool

TRUST = Choices(trust_pickle=True)
TOKENS = torch.randint(0, 128, (2, 96), generator=torch.Generator().manual_seed(1))
# FP32 against another program's attention and norms
LOGITS = 1e-4


def logits_of(reader: Reader) -> torch.Tensor:
    """[B, S, V] of TOKENS, by the model here."""
    runner = OwnRunner(Weights(reader), torch.float32)
    assert len(list(runner.activations([TOKENS]))) == reader.model.num_layers + 1
    return torch.cat(list(runner.logits())).unflatten(0, tuple(TOKENS.shape))


@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen3", "mixtral", "qwen3-moe-dense"])
def test_megatron_core_loads_and_computes_the_same(pool: Pool, tmp_path: Path, name: str) -> None:
    source = save_model(name, tmp_path / "source")
    convert(Request(source, tmp_path / "run", "megatrain", longest=96, choices=Choices(vocab_multiple=8)))
    record = convert(Request(tmp_path / "run", tmp_path / "megatron", "megatron", longest=96))
    assert record["status"] == "verified"
    model = model_spec(record["model"])
    (logits,) = pool.run(load_and_run, 1, str(tmp_path / "megatron" / "iter_0000000"), model, TOKENS)
    ours = logits_of(FORMATS["megatrain"].read(tmp_path / "run", Choices()))
    assert float((logits[..., : ours.shape[-1]] - ours).abs().max()) < LOGITS
    back = Request(tmp_path / "megatron", tmp_path / "back", "megatrain", longest=96, choices=TRUST)
    assert convert(back)["status"] == "verified"


EXPERTS: dict[str, Any] = {"attention.num_kv_heads": 2, "experts.num_experts": 4, "experts.hidden_size": 16}
SAVED: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"attention.num_kv_heads": 2},
    "qwen3": {"attention.num_kv_heads": 2},
    "mixture": EXPERTS,
    "mixture with all": EXPERTS
    | {"experts.num_dense_layers": 1, "experts.num_shared": 1, "router.score": "sigmoid", "router.balance_rate": 1e-3},
}


def sized(name: str) -> ModelSpec:
    family = name if name in ("gpt", "qwen3") else "llama"
    sizes = {"num_layers": 2, "hidden_size": 32, "attention.num_heads": 4, "vocab_size": 128, "max_seq_len": 96}
    return model_spec({"family": family, **sizes, **SAVED[name]})


@pytest.mark.parametrize(("name", "singly"), [*((name, False) for name in SAVED), ("mixture with all", True)])
def test_what_megatron_core_saved_is_read(pool: Pool, tmp_path: Path, name: str, singly: bool) -> None:
    model = sized(name)
    folder = tmp_path / "iter_0000007"
    (logits,) = pool.run(save_and_run, 1, str(folder), model, TOKENS, name != "mixture", singly)
    (tmp_path / "my.yaml").write_text("model: " + model.model_dump_json())
    choices = Choices(trust_pickle=True, model_file=tmp_path / "my.yaml")
    convert(Request(folder, tmp_path / "run", "megatrain", longest=96, choices=choices))
    reader = FORMATS["megatrain"].read(tmp_path / "run", Choices())
    assert reader.step == 7
    assert float((logits_of(reader) - logits).abs().max()) < LOGITS


# name -> (model, optimizer)
OPTIMIZERS = {
    "FP32": ("llama", OptimizerKind()),
    "BF16, a mixture": ("mixture with all", OptimizerKind(bf16=True)),
    "distributed": ("mixture", OptimizerKind(distributed=True, bf16=True)),
    "distributed, experts spread": ("mixture with all", OptimizerKind(distributed=True, bf16=True, expert_ranks=2)),
    "experts spread": ("mixture", OptimizerKind(bf16=True, expert_ranks=2)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("distributed", "experts spread") else ())
        for name in OPTIMIZERS
    ],
)
def test_states_of_the_optimizer_go_both_ways(pool: Pool, tmp_path: Path, name: str) -> None:
    """Megatron-core -> here -> Megatron-core, which saves once more: states, groups and the step, bit for bit."""
    model, kind = sized(OPTIMIZERS[name][0]), OPTIMIZERS[name][1]
    saved, back, again = tmp_path / "iter_0000002", tmp_path / "back" / "iter_0000002", tmp_path / "again"
    ranks = 2 if kind.distributed or kind.expert_ranks > 1 else 1  # the others keep all on each rank
    trained = pool.run(train_and_save, ranks, str(saved), model, TOKENS, kind)[0]
    (tmp_path / "model.yaml").write_text("model: " + model.model_dump_json())
    convert(Request(saved, tmp_path / "run", "megatrain", longest=96, choices=TRUST))
    reader = FORMATS["megatrain"].read(tmp_path / "run", Choices())
    assert set(reader.kinds) == {"weight", "exp_avg", "exp_avg_sq"} and reader.step == 2
    choices = Choices(dtype=torch.bfloat16 if kind.bf16 else torch.float32, spread_experts=kind.expert_ranks > 1)
    assert convert(Request(tmp_path / "run", back.parent, "megatron", longest=96, choices=choices))["left_behind"] == []
    loaded = pool.run(load_and_save, ranks, str(back), str(again), model, TOKENS, kind)[0]
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[key], trained[key]) for key in trained)
    ours, theirs, first = (TorchDistReader(folder) for folder in (back, again, saved))
    tensors = [key for key in first.entries if first.shape(key) is not None]
    assert tensors == [key for key in theirs.entries if theirs.shape(key) is not None]
    for key in tensors:
        assert torch.equal(ours.read(key), first.read(key)), key
        assert torch.equal(theirs.read(key), first.read(key)), key
    assert _groups(again) == _groups(saved)


def _groups(folder: Path) -> list[dict[str, Any]]:
    """What tells the groups of all optimizers apart, and what holds for them without a schedule."""
    states = torch.load(folder / "common.pt", weights_only=True)["optimizer"]
    fields = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config", "betas", "eps")
    found = []
    for one in [states[0], states[1]] if 0 in states else [states]:
        shared = one.get("optimizer", one)
        for group in shared["param_groups"]:
            step = float(shared.get("state", {}).get("common_step") or group["step"])
            found.append({"step": step} | {field: group[field] for field in fields})
    return found


def test_masters_are_kept_and_left_behind_on_request(pool: Pool, tmp_path: Path) -> None:
    model, choices = sized("mixture"), Choices(dtype=torch.bfloat16, trust_pickle=True)
    arguments = (str(tmp_path / "iter_0000002"), model, TOKENS, OptimizerKind(expert_ranks=2))
    pool.run(train_and_save, 2, *arguments, chained_optim_avoid_prefix=False)  # as older versions named them
    prefix = "chained_1.optimizer.state.exp_avg."
    assert any(key.startswith(prefix) for key in TorchDistReader(tmp_path / "iter_0000002").entries)
    (tmp_path / "model.yaml").write_text("model: " + model.model_dump_json())
    convert(Request(tmp_path / "iter_0000002", tmp_path / "run", "megatrain", longest=96, choices=TRUST))
    convert(Request(tmp_path / "run", tmp_path / "back", "megatron", longest=96, choices=choices))
    first, back = (FORMATS["megatron"].read(folder, TRUST) for folder in (tmp_path / "iter_0000002", tmp_path / "back"))
    name = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    assert torch.equal(back.read("weight", name), first.read("weight", name)), "not rounded"
    assert torch.equal(back.read("exp_avg", name), first.read("exp_avg", name))
    alone = replace(choices, weights_only=True)
    assert FORMATS["megatron"].read(tmp_path / "back", alone).kinds == ("weight",)


def test_states_in_the_arrangement_of_a_layout_are_refused(tmp_path: Path, exported: Path) -> None:
    folder = exported / "iter_0000000"
    found = pickle.loads((folder / ".metadata").read_bytes())
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg"
    found.state_dict_metadata[key] = next(iter(found.state_dict_metadata.values()))
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(ConversionError, match=r"not stored parameter by parameter: .* --weights-only"):
        convert(Request(exported, tmp_path / "run", "megatrain", choices=TRUST))
    choices = Choices(trust_pickle=True, weights_only=True)
    assert (
        convert(Request(exported, tmp_path / "run", "megatrain", longest=32, choices=choices))["status"] == "verified"
    )


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    source = save_model("llama2", tmp_path / "source")
    convert(Request(source, tmp_path / "megatron", "megatron", verify=False))
    return tmp_path / "megatron"


def test_a_pickle_is_opened_only_on_request(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ConversionError, match=r"is a pickle, which can run any code .* --trust-pickle"):
        convert(Request(exported, tmp_path / "run", "megatrain"))


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
