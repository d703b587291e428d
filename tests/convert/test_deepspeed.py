"""DeepSpeed's ZeRO and universal checkpoints both ways: its engine and tools take ours, we take theirs, bit for bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatrain.convert.errors import ConversionError
from megatrain.convert.formats import FORMATS, Choices
from megatrain.convert.run import Request, convert
from megatrain.convert.table import Reader, canonical_shapes
from tests.checkpoint.payload import Payload
from tests.configs import model_spec
from tests.convert.deepspeed_model import (
    Tensors,
    load_universal,
    save_spread_experts,
    save_with_autoep,
    to_fp32,
    to_universal,
    train_and_save,
)
from tests.convert.models import save_model
from tests.pool import Pool

TRUST = Choices(trust_pickle=True)


def equal(reader: Reader, tensors: Tensors) -> bool:
    """Whether a reader, under its own names, gives these weights and moments."""
    names = {name for kind, name in tensors if kind == "weight"}
    assert set(reader.names()) == names and set(reader.kinds) == {kind for kind, _ in tensors}
    return all(torch.equal(reader.read(*key), tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(("zero_stage", "name"), [(1, "llama-tied-linear"), (2, "mixtral"), (3, "qwen3-moe-dense")])
def test_what_deepspeed_saved_is_read_and_given_back(pool: Pool, tmp_path: Path, zero_stage: int, name: str) -> None:
    """Weights and moments: DeepSpeed -> here -> both of its formats -> its engine."""
    source = save_model(name, tmp_path / "source")
    trained = pool.run(train_and_save, 2, str(source), str(tmp_path / "ds"), zero_stage)[0]
    convert(Request(source, tmp_path / "names", "megatrain", verify=False))  # for its model.yaml
    choices = Choices(trust_pickle=True, model_file=tmp_path / "names" / "model.yaml", zero_ranks=3)
    assert equal(FORMATS["deepspeed"].read(tmp_path / "ds", choices), trained)
    record = convert(Request(tmp_path / "ds", tmp_path / "run", "megatrain", longest=32, choices=choices))
    assert record["status"] == "verified" and record["proof"]["num_tensors"] == 3 * len(
        canonical_shapes(model_spec(record["model"]))
    )
    for to in ("deepspeed", "universal"):
        assert (
            convert(Request(tmp_path / "run", tmp_path / to, to, longest=32, choices=choices))["status"] == "verified"
        )
        assert equal(FORMATS[to].read(tmp_path / to, TRUST), trained)
    loaded = pool.run(load_universal, 2, str(source), str(tmp_path / "universal"))[0]
    assert all(torch.equal(loaded[key], tensor) for key, tensor in trained.items())


def test_several_tensor_ranks_are_read_and_written(pool: Pool, tmp_path: Path) -> None:
    """What AutoTP saved on two tensor and two data-parallel ranks; ours for two and three, merged by DeepSpeed."""
    source = save_model("llama3", tmp_path / "source", tokens=132)
    trained = pool.run(train_and_save, 4, str(source), str(tmp_path / "ds"), 1, 2)
    convert(Request(source, tmp_path / "names", "megatrain", verify=False))
    choices = Choices(trust_pickle=True, model_file=tmp_path / "names" / "model.yaml", zero_ranks=3, tensor_ranks=2)
    reader = FORMATS["deepspeed"].read(tmp_path / "ds", choices)
    assert len(list((tmp_path / "ds").rglob("zero_pp_rank_1_mp_rank_01_optim_states.pt"))) == 1
    wholes = {}
    for (kind, name), part in trained[0].items():
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        wholes[kind, name] = reader.read(kind, name)
        same = wholes[kind, name].shape == part.shape
        parts = torch.cat([part, trained[1][kind, name]], dim)
        assert torch.equal(wholes[kind, name], part if same else parts), (kind, name)
    assert convert(Request(tmp_path / "ds", tmp_path / "run", "megatrain", longest=32, choices=choices))
    convert(Request(tmp_path / "run", tmp_path / "back", "deepspeed", longest=32, choices=choices))
    assert equal(FORMATS["deepspeed"].read(tmp_path / "back", TRUST), wholes)
    theirs, ours = (
        torch.load(next((tmp_path / name).rglob("mp_rank_01_model_states.pt")), weights_only=False)["param_shapes"]
        for name in ("ds", "back")
    )
    assert theirs == ours, "the same order, cut the same way"
    (tmp_path / "theirs").mkdir()
    merged = tmp_path / "theirs" / "global_step2_universal"
    pool.run(to_universal, 1, str(tmp_path / "back" / "global_step2"), str(merged))
    model_file = Choices(trust_pickle=True, model_file=tmp_path / "back" / "model.yaml")
    assert equal(FORMATS["universal"].read(tmp_path / "theirs", model_file), wholes)


def converted_and_read(tmp_path: Path, choices: Choices, rank: Tensors, router: str) -> Reader:
    """What came of DeepSpeed's checkpoint, whose step, kinds and routers are those of ``rank``."""
    assert convert(Request(tmp_path / "ds", tmp_path / "run", "megatrain", longest=32, choices=choices))
    reader = FORMATS["megatrain"].read(tmp_path / "run", Choices())
    assert reader.step == 2 and set(reader.kinds) == {kind for kind, _ in rank}
    for kind, layer in ((kind, layer) for kind in reader.kinds for layer in range(3)):
        ours = reader.read(kind, f"layers.{layer}.feed_forward.router.weight")
        assert torch.equal(ours, rank[kind, f"model.layers.{layer}.mlp.{router}.weight"]), (kind, layer)
    return reader


def whole_experts(ranks: list[Tensors], kind: str, layer: int, matrix: str) -> torch.Tensor:
    """[E, F, D] of what the ranks of an expert axis hold under the same name."""
    name = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts"
    return torch.stack([rank[kind, f"{name}.{expert}.{matrix}.weight"].t() for rank in ranks for expert in range(2)])


@pytest.mark.parametrize(
    ("zero_stage", "data_first", "bf16"),
    [(1, False, False), (2, True, False), pytest.param(1, False, True, marks=pytest.mark.slow)],
)
def test_experts_that_deepspeed_spread_over_ranks_are_read(
    pool: Pool, tmp_path: Path, zero_stage: int, data_first: bool, bf16: bool
) -> None:
    """Two ranks share a layer's experts, twice over, so that ZeRO splits those of each too."""
    source = save_model("mixtral", tmp_path / "source")
    ranks = pool.run(save_spread_experts, 4, str(source), str(tmp_path / "ds"), zero_stage, data_first, bf16)
    ranks = [ranks[0], ranks[2 if data_first else 1]]
    convert(Request(source, tmp_path / "names", "megatrain", verify=False))
    choices = Choices(trust_pickle=True, model_file=tmp_path / "names" / "model.yaml")
    reader = converted_and_read(tmp_path, choices, ranks[0], "deepspeed_moe.gate.wg")
    for kind, layer in ((kind, layer) for kind in reader.kinds for layer in range(3)):
        for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
            found = reader.read(kind, f"layers.{layer}.feed_forward.experts.{ours}")
            assert found.any() and torch.equal(found, whole_experts(ranks, kind, layer, theirs)), (kind, layer, ours)
    file = tmp_path / "ds" / "global_step2" / "layer_1_expert_2_mp_rank_00_model_states.pt"
    shutil.copy(file.with_name(file.name.replace("expert_2", "expert_3")), tmp_path / "third")
    third = {name.replace("experts.3.", "experts.2."): value for name, value in torch.load(tmp_path / "third").items()}
    torch.save(third, file)
    with pytest.raises(
        ConversionError, match=r"layers\.1\..*experts\.2\..*: the optimizer's weight, rounded, is not that of"
    ):
        convert(Request(tmp_path / "ds", tmp_path / "again", "megatrain", longest=32, choices=choices))


def test_spread_experts_without_zero_are_read_without_states(pool: Pool, tmp_path: Path) -> None:
    source = save_model("mixtral", tmp_path / "source")
    ranks = pool.run(save_spread_experts, 2, str(source), str(tmp_path / "ds"), 0)
    convert(Request(source, tmp_path / "names", "megatrain", verify=False))
    choices = Choices(trust_pickle=True, model_file=tmp_path / "names" / "model.yaml")
    with pytest.raises(
        ConversionError, match=r"\(in expp_rank_0_.*\) were saved without ZeRO.* --weights-only takes the"
    ):
        convert(Request(tmp_path / "ds", tmp_path / "run", "megatrain", choices=choices))
    choices = replace(choices, weights_only=True)
    assert convert(Request(tmp_path / "ds", tmp_path / "run", "megatrain", longest=32, choices=choices))
    found = FORMATS["megatrain"].read(tmp_path / "run", Choices()).read("weight", "layers.1.feed_forward.experts.down")
    assert torch.equal(found, whole_experts(ranks, "weight", 1, "w2"))


def test_deepspeeds_tools_take_ours(pool: Pool, tmp_path: Path) -> None:
    source = save_model("qwen3", tmp_path / "source")
    convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    choices = Choices(zero_ranks=3)
    convert(Request(tmp_path / "run", tmp_path / "ds", "deepspeed", longest=32, choices=choices))
    reader = FORMATS["huggingface"].read(source, Choices())
    merged = pool.run(to_fp32, 1, str(tmp_path / "ds"))[0]
    assert merged.keys() == set(reader.names())
    assert all(torch.equal(tensor, reader.read("weight", name)) for name, tensor in merged.items())
    (tmp_path / "theirs").mkdir()
    pool.run(
        to_universal, 1, str(tmp_path / "ds" / "global_step0"), str(tmp_path / "theirs" / "global_step0_universal")
    )
    theirs = FORMATS["universal"].read(
        tmp_path / "theirs", Choices(trust_pickle=True, model_file=tmp_path / "ds" / "model.yaml")
    )
    assert all(torch.equal(theirs.read("weight", name), reader.read("weight", name)) for name in reader.names())


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    source = save_model("llama2", tmp_path / "source")
    convert(Request(source, tmp_path / "ds", "deepspeed", verify=False, choices=Choices(zero_ranks=2)))
    return tmp_path / "ds"


@pytest.mark.parametrize(
    ("zero_stage", "name"),
    [
        (1, "mixtral"),
        (3, "qwen3-moe"),
        pytest.param(2, "qwen3-moe", marks=pytest.mark.slow),
        pytest.param(0, "mixtral", marks=pytest.mark.slow),
    ],
)
def test_experts_that_autoep_spread_over_ranks_are_read(pool: Pool, tmp_path: Path, zero_stage: int, name: str) -> None:
    source = save_model(name, tmp_path / "source")
    ranks = pool.run(save_with_autoep, 4, str(source), str(tmp_path / "ds"), zero_stage)
    convert(Request(source, tmp_path / "names", "megatrain", verify=False))
    choices = Choices(trust_pickle=True, model_file=tmp_path / "names" / "model.yaml", weights_only=zero_stage == 0)
    reader = converted_and_read(tmp_path, choices, ranks[0], "router.gate")
    for kind, layer in ((kind, layer) for kind in reader.kinds for layer in range(3)):
        for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
            parts = [rank[kind, f"model.layers.{layer}.mlp.experts.{theirs}"] for rank in ranks[:2]]
            found = reader.read(kind, f"layers.{layer}.feed_forward.experts.{ours}")
            assert found.any() and torch.equal(found, torch.cat(parts).transpose(1, 2)), (kind, layer, ours)


def test_experts_of_autoep_over_tensor_ranks_are_refused(tmp_path: Path, exported: Path) -> None:
    states = exported / "global_step0" / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(states, weights_only=True), "folding": {"family": "dense"}}, states)
    with pytest.raises(ConversionError, match=r"mp_rank_00_.* DeepSpeed's AutoEP folded .*pytorch_model.bin beside"):
        convert(Request(exported, tmp_path / "run", "megatrain", choices=TRUST))


def test_pickles_are_opened_only_on_request(tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = exported / "global_step0" / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(states, weights_only=True), "extra": Payload(tmp_path / "ran")}, states)
    with pytest.raises(ConversionError, match=r"is a pickle, which can run any code .* --trust-pickle"):
        convert(Request(exported, tmp_path / "run", "megatrain", longest=32))
    assert not (tmp_path / "ran").exists(), "nothing ran unasked"
    convert(Request(exported, tmp_path / "run", "megatrain", longest=32, choices=TRUST))
    assert (tmp_path / "ran").exists() and "opened as a full pickle" in capsys.readouterr().out


def test_a_missing_rank_and_a_torn_file_are_named(tmp_path: Path, exported: Path) -> None:
    file = exported / "global_step0" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match="zero_pp_rank_0_mp_rank_00"):
        convert(Request(exported, tmp_path / "run", "megatrain", choices=TRUST))
    file.unlink()
    with pytest.raises(ConversionError, match="ranks are missing"):
        convert(Request(exported, tmp_path / "run", "megatrain", choices=TRUST))


@pytest.mark.parametrize("rank", ["", "-model_00"])
def test_a_pipeline_is_refused_and_the_cure_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    """The layers of a Llama, as PipelineModule.save_state_dict names their files; no ZeRO."""
    monkeypatch.chdir(tmp_path)
    source = FORMATS["huggingface"].read(save_model("llama2", tmp_path / "source"), Choices())
    modules = ["model.embed_tokens.", *(f"model.layers.{block}." for block in range(3)), "model.norm.", "lm_head."]
    (tmp_path / "global_step100").mkdir()
    for number, prefix in enumerate(modules):
        names = [name for name in source.names() if name.startswith(prefix)]
        layer = {name.removeprefix(prefix): source.read("weight", name) for name in names}
        torch.save(layer, tmp_path / "global_step100" / f"layer_{number:02d}{rank}-model_states.pt")
    with pytest.raises(ConversionError, match=r"of a pipeline, .* like layer_00.*pytorch_model.bin .*conversion.md"):
        convert(Request(tmp_path / "global_step100", tmp_path / "run", "megatrain", choices=TRUST))

    page = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    (tmp_path / "exported").mkdir()
    shutil.copy(source.path / "config.json", tmp_path / "exported")
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    convert(Request(tmp_path / "exported", tmp_path / "run", "megatrain", longest=32, choices=TRUST))
    convert(Request(tmp_path / "run", tmp_path / "back", "huggingface", longest=32))
    back = FORMATS["huggingface"].read(tmp_path / "back", Choices())
    assert all(torch.equal(back.read("weight", name), source.read("weight", name)) for name in source.names())


def test_stand_ins_suffice_for_what_deepspeed_writes(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model("llama2", tmp_path / "source")
    pool.run(train_and_save, 1, str(source), str(tmp_path / "ds"), 1)
    convert(Request(source, tmp_path / "names", "megatrain", verify=False))
    FORMATS["deepspeed"].read(tmp_path / "ds", Choices(trust_pickle=True, model_file=tmp_path / "names" / "model.yaml"))
    assert "full pickle" not in capsys.readouterr().out
