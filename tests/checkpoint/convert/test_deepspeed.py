"""DeepSpeed's ZeRO and universal checkpoints both ways: its engine and tools take ours, we take theirs, bit for bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.formats import FORMATS, Choices
from megatrain.checkpoint.convert.run import Request, convert
from megatrain.checkpoint.convert.table import Reader, canonical_shapes
from megatrain.config.schema import ModelConfig
from tests.checkpoint.convert.deepspeed_model import (
    Tensors,
    load_universal,
    save_spread_experts,
    to_fp32,
    to_universal,
    train_and_save,
)
from tests.checkpoint.convert.models import save_model
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
        canonical_shapes(ModelConfig.model_validate(record["model"]))
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


def test_experts_that_deepspeed_spread_over_ranks_are_read(pool: Pool, tmp_path: Path) -> None:
    source = save_model("mixtral", tmp_path / "source")
    ranks = pool.run(save_spread_experts, 2, str(source), str(tmp_path / "ds"))
    convert(Request(source, tmp_path / "names", "megatrain", verify=False))
    choices = Choices(trust_pickle=True, model_file=tmp_path / "names" / "model.yaml")
    with pytest.raises(ConversionError, match=r"spread over ranks, .*in expp_rank_.* --weights-only takes the"):
        convert(Request(tmp_path / "ds", tmp_path / "run", "megatrain", choices=choices))
    choices = replace(choices, weights_only=True)
    assert convert(Request(tmp_path / "ds", tmp_path / "run", "megatrain", longest=32, choices=choices))
    reader = FORMATS["megatrain"].read(tmp_path / "run", Choices())
    prefix, experts = "model.layers.1.mlp.deepspeed_moe", "layers.1.feed_forward.experts"
    assert torch.equal(
        reader.read("weight", "layers.1.feed_forward.router.weight"), ranks[0][f"{prefix}.gate.wg.weight"]
    )
    for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        stacked = [
            rank[f"{prefix}.experts.deepspeed_experts.{e}.{theirs}.weight"].t() for rank in ranks for e in range(2)
        ]
        assert torch.equal(reader.read("weight", f"{experts}.{ours}"), torch.stack(stacked))


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


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


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

    page = (Path(__file__).parents[3] / "docs" / "conversion.md").read_text()
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
