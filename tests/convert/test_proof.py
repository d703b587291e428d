"""Conversion bugs that recur, planted one by one: each fails the proof, whatever it is that could see it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.convert import main
from megatrain.convert import forms, run, table
from megatrain.convert.errors import ProofFailed
from megatrain.convert.families.qwen3 import QWEN3
from megatrain.convert.formats import Choices
from megatrain.convert.huggingface import config as hf_config
from megatrain.convert.huggingface import model as huggingface
from megatrain.convert.run import Request, convert
from tests.convert.models import save_model

Patch = pytest.MonkeyPatch
ATTENTION = "model.layers.1.self_attn"


def in_one_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """A bug in what is written under one name."""

    def plant(patch: Patch) -> None:
        write = huggingface.HuggingFaceWriter.write
        patch.setattr(
            huggingface.HuggingFaceWriter,
            "write",
            lambda self, kind, key, tensor: write(self, kind, key, change(tensor) if key == name else tensor),
        )

    return plant


def in_config(**values: Any) -> Callable[[Patch], None]:
    """A bug in what ``config.json`` says."""

    def plant(patch: Patch) -> None:
        right = hf_config.config_from_model
        patch.setattr(huggingface, "config_from_model", lambda model: right(model) | values)

    return plant


def in_form(line: str, form: forms.Form) -> Callable[[Patch], None]:
    """A bug in the table that both directions share: writing and reading back cancel it."""

    def plant(patch: Patch) -> None:
        lines = tuple(dataclasses.replace(old, form=form) if old.ours == line else old for old in QWEN3.lines)
        wrong = dataclasses.replace(QWEN3, lines=lines)
        patch.setattr(hf_config, "FAMILIES", (wrong,))

    return plant


def interleaved(weight: Tensor) -> Tensor:
    """RoPE's pairs side by side instead of half a head apart; heads of width 16."""
    heads = weight.unflatten(0, (-1, 2, 8))
    return heads.transpose(1, 2).flatten(0, 2)


def regrouped(tensors: Any, model: Any) -> list[Tensor]:
    """Queries dealt out to the groups in turn, instead of in blocks."""
    query, key, value = tensors
    blocks = query.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
    return forms.QUERY_KEY_VALUE.to_ours([blocks, key, value], model)


def ungrouped(tensors: Any, model: Any) -> list[Tensor]:
    query, key, value = forms.QUERY_KEY_VALUE.to_theirs(tensors, model)
    return [query.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2), key, value]


def swapped_gate_and_up(patch: Patch) -> None:
    """In the table: ``gate`` under the name of ``up`` and the other way."""
    other = {"gate": "up", "up": "gate"}
    lines = []
    for line in QWEN3.lines:
        part = str(line.ours).split(".")[-2]
        lines.append(
            dataclasses.replace(line, ours=f"layers.{{}}.feed_forward.{other[part]}.weight") if part in other else line
        )
    patch.setattr(hf_config, "FAMILIES", (dataclasses.replace(QWEN3, lines=tuple(lines)),))


def padding_left_in(patch: Patch) -> None:
    """The padded rows are written and counted as tokens."""
    for module in (forms, hf_config):
        patch.setattr(module, "num_tokens", lambda model: model.vocab_size)


BUGS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "RoPE layout in one layer": (in_one_tensor(f"{ATTENTION}.q_proj.weight", interleaved), r"layers\.1 "),
    "grouped queries regrouped": (
        in_form("layers.{}.attention.query_key_value.weight", forms.Form(regrouped, ungrouped)), r"layers\.0 ",
    ),
    "gate and up swapped": (swapped_gate_and_up, r"layers\.0 "),
    "theta": (in_config(rope_theta=20000.0), r"layers\.0 "),
    "norm epsilon": (in_config(rms_norm_eps=1e-3), r"layers\.0 "),
    "a flipped sign": (
        in_one_tensor("model.layers.2.mlp.down_proj.weight", lambda weight: weight * torch.where(
            torch.arange(weight.numel()).view_as(weight) == 5, -1, 1)), r"layers\.2 ",
    ),
    "vocabulary padding left in": (padding_left_in, "vocabulary padding left in"),
    "a head norm": (in_one_tensor(f"{ATTENTION}.q_norm.weight", lambda weight: weight.flip(0)), r"layers\.1 "),
    "the head": (in_one_tensor("lm_head.weight", lambda weight: weight.roll(1, 0)), "the final norm or the head"),
}  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 3 with a padded vocabulary, imported."""
    folder = tmp_path_factory.mktemp("models")
    source = save_model("qwen3", folder / "source")
    convert(Request(source, folder / "run", "megatrain", longest=96, choices=Choices(vocab_multiple=8)))
    return folder / "run"


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_by_the_logits(tmp_path: Path, imported: Path, monkeypatch: Patch, bug: str) -> None:
    plant, where = BUGS[bug]
    plant(monkeypatch)
    monkeypatch.setattr(run, "require_equal_configs", lambda source, target: None)
    with pytest.raises(ProofFailed, match=where):
        convert(Request(imported, tmp_path / "out", "huggingface", longest=96))
    assert not (tmp_path / "out").exists()
    record = json.loads((tmp_path / "out.failed" / "conversion.json").read_text())
    assert record["status"] == "failed" and record["problem"]


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (in_config(rope_theta=20000.0), "rope.theta: 10000.0 and 20000.0"),
        (in_config(rms_norm_eps=2e-5), "norm.eps: 1e-05 and 2e-05"),
        (in_config(vocab_size=136), "vocabulary: 131 and 136 tokens"),
    ],
    ids=["theta", "norm epsilon", "padding"],
)
def test_a_wrong_config_is_caught_by_itself(
    tmp_path: Path, imported: Path, monkeypatch: Patch, plant: Callable[[Patch], None], message: str
) -> None:
    plant(monkeypatch)
    with pytest.raises(ProofFailed, match=message):
        convert(Request(imported, tmp_path / "out", "huggingface", longest=96))


def test_a_change_too_small_for_the_logits_is_caught_by_the_bits(
    tmp_path: Path, imported: Path, monkeypatch: Patch
) -> None:
    in_one_tensor("model.layers.2.mlp.down_proj.weight", lambda weight: torch.nextafter(weight, weight + 1))(
        monkeypatch
    )
    with pytest.raises(ProofFailed, match=r"1 of \d+ tensors .* weight of layers\.2\.feed_forward\.down\.weight"):
        convert(Request(imported, tmp_path / "out", "huggingface", longest=96))


def test_the_program_says_it_once_and_exits_with_3(
    tmp_path: Path, imported: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(imported), str(tmp_path / "out"), "--to", "huggingface", "--proof-tokens", "32"]
    with monkeypatch.context() as patch:
        in_config(rope_theta=20000.0)(patch)
        assert main(arguments) == 3
    error = capsys.readouterr().err
    assert "error: the config that was written" in error and "Traceback" not in error and "out.failed" in error
    assert main(arguments) == 2, "the failed one is in the way"
    arguments[1] += "2"
    assert main(arguments) == 0
    assert "huggingface, verified: 30 tensors bit-equal" in capsys.readouterr().out


def test_every_line_of_a_table_is_read(imported: Path) -> None:
    from megatrain.convert.formats import FORMATS

    reader = FORMATS["megatrain"].read(imported, Choices())
    names = {name for entry in table.entries(QWEN3.lines, reader.model) for name in entry.ours}
    assert names == set(table.canonical_shapes(reader.model))
