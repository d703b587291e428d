"""No false alarm of the parity tool: layouts of every axis, in every type and with every optimizer."""

from typing import Any

import pytest

from megatrain.config.rules.check import check
from tests.layouts import Layout, run_config
from tests.parallel.test_mixture import MODELS
from tests.parity.test_parity import differences
from tests.pool import Pool

LAYOUTS = [
    *(Layout(dp=2, zero_stage=stage) for stage in (0, 1, 2, 3)),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True, zero_stage=1),
    Layout(cp=2, zero_stage=1),
    Layout(cp=2, cp_method="ulysses", zero_stage=2),
    *(Layout(pp=2, schedule=schedule) for schedule in ("gpipe", "1f1b", "interleaved_1f1b")),
    Layout(pp=2, schedule="interleaved_zero_bubble"),
    Layout(pp=2, schedule="zbv", zero_stage=1),
    Layout(pp=2, schedule="dualpipev", zero_stage=1),
    Layout(tp=2, dp=2, sequence_parallel=True, zero_stage=3),
    Layout(tp=2, pp=2, zero_stage=1),
    Layout(cp=2, dp=2, zero_stage=2),
    Layout(pp=2, dp=2, zero_stage=1),
    Layout(dp=2, ep=2),
    Layout(cp=2, ep=2, zero_stage=2),
    Layout(tp=2, dp=2, ep=2, zero_stage=1),
]
MODEL_OF = {
    "gpt": ("gpt", {}),
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"model": {"dropout": 0.1, "attention.dropout": 0.1}}),
    "gpt mixture": ("gpt", {"model": MODELS["gpt"]}),
    "llama mixture": ("llama", {"model": MODELS["llama"]}),
    "recomputed": ("llama", {"train": {"activation_checkpointing": "full", "micro_batch_size": 1}}),
}
CASES = [(model, dtype, "adamw") for model in MODEL_OF for dtype in ("fp32", "bf16", "fp16")]
CASES += [("llama", dtype, name) for name in ("lion", "adafactor", "muon") for dtype in ("fp32", "bf16", "fp16")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "dtype", "optimizer"), CASES)
def test_right_layouts_raise_no_alarm(pool: Pool, model: str, dtype: str, optimizer: str) -> None:
    family, of_model = MODEL_OF[model]
    rate = 1e-3 if optimizer == "lion" else 1e-2  # as advised: a third to a tenth of AdamW's
    sections: dict[str, Any] = of_model | {
        "precision": {"dtype": dtype},
        "optimizer": {"name": optimizer, "lr": rate},
    }
    found, compared = [], 0
    for layout in LAYOUTS:
        if goes_together(family, layout, sections):
            compared += 1
            found += [f"{layout}: {difference}" for difference in differences(pool, family, layout, None, **sections)]
    assert compared >= 10 and not found, "\n".join(found)


def goes_together(family: str, layout: Layout, sections: dict[str, Any]) -> bool:
    """Whether the rules have the config (experts' ranks without experts, Muon under ZeRO 3)."""
    if layout.ep > 1 and not sections.get("model", {}).get("experts.num_experts"):
        return False
    try:
        config = run_config(
            family, layout, **sections | {"train": {"micro_batch_size": 2, **sections.get("train", {})}}
        )
    except AssertionError:
        return False
    return check(config, layout.world_size) == []
