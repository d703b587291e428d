"""A setting that does nothing is refused: each field that counts only with another, without it and with it."""

import pytest

from megatrain.config.rules.effect import COUNTS_WITH
from tests.config.test_rules import problems_of

MIXTURE = "model.experts.num_experts=4"
FP16 = "precision.dtype=fp16"
# what is set, and what it counts with; the cure names the field of the latter
CASES = [
    ("model.experts.per_token=1", MIXTURE),
    ("model.experts.hidden_size=64", MIXTURE),
    ("model.router.normalize=false", MIXTURE),
    ("model.router.scale=2.5", MIXTURE),
    ("model.router.groups_per_token=2", MIXTURE),
    ("model.router.balance_loss=0.5", MIXTURE),
    ("model.router.z_loss=0.1", MIXTURE),
    ("model.rope.theta=500000.0", "model.family=qwen3"),
    ("model.rope.scaling=linear", "model.family=qwen3"),
    ("model.attention.window=8", "model.family=mistral"),
    ("model.rope.factor=2.0", "model.rope.scaling=linear"),
    ("model.rope.original_max_seq_len=512", "model.rope.scaling=dynamic"),
    (
        "model.rope.short_factors=[1.0,1.0]",
        "model.rope.scaling=longrope model.attention.head_width=4 model.rope.long_factors=[2.0,2.0]",
    ),
    (
        "model.rope.long_factors=[2.0,2.0]",
        "model.rope.scaling=longrope model.attention.head_width=4 model.rope.short_factors=[1.0,1.0]",
    ),
    ("model.rope.low_freq_factor=2.0", "model.rope.scaling=llama3"),
    ("model.rope.high_freq_factor=8.0", "model.rope.scaling=llama3"),
    ("model.rope.beta_fast=16.0", "model.rope.scaling=yarn"),
    ("model.rope.beta_slow=2.0", "model.rope.scaling=yarn"),
    ("model.rope.attention_factor=1.5", "model.rope.scaling=yarn"),
    ("precision.initial_loss_scale=1024", FP16),
    ("precision.loss_scale_window=10", FP16),
    ("precision.loss_scale_hysteresis=2", FP16),
    ("precision.min_loss_scale=2", FP16),
    ("optimizer.beta1=0.8", "optimizer.name=lion"),
    ("optimizer.beta2=0.99", "optimizer.name=lion"),
    ("optimizer.eps=1e-6", "optimizer.name=muon"),
    ("optimizer.muon_momentum=0.9", "optimizer.name=muon"),
    ("optimizer.muon_split_qkv=false", "optimizer.name=muon"),
    ("offload.nvme_path=/tmp", "offload.optimizer=nvme parallel.zero_stage=3"),
    ("schedule.decay_steps=50", "schedule.name=cosine"),
    ("schedule.min_lr_ratio=0.5", "schedule.name=inverse_sqrt"),
    ("data.temperature=2.0", "data.weigh_by=tokens"),
    ("data.mask_probability=0.3", 'data.objective=masked model.blocks=["bidirectional"]'),
    ("data.mask_token=5", 'data.objective=masked model.blocks=["bidirectional"]'),
    ("train.checkpoint_every_nth=3", "train.activation_checkpointing=every_nth"),
    ("train.activation_budget=0.25", "train.activation_checkpointing=budget"),
    ("checkpoint.keep_every=100", "checkpoint.keep_last=2"),
    ("checkpoint.load_what=weights", "checkpoint.load=runs/other/checkpoints/step-00000010"),
]
# where the default of the field that it counts with would do
WITHOUT = {
    "model.family": "model.family=gpt",
    "optimizer.name": "optimizer.name=adafactor",
    "schedule.name": "schedule.name=constant",
}


@pytest.mark.parametrize(("setting", "needed"), CASES)
def test_a_setting_without_effect_is_refused(setting: str, needed: str) -> None:
    key, other = setting.partition("=")[0], needed.partition("=")[0]
    found = {problem.key: problem for problem in problems_of(f"{WITHOUT.get(other, '')} {setting}", None)}
    assert "has no effect: it counts only with " in found[key].message
    section = other.partition(".")[0]
    assert section in found[key].cure and f"leave {key} out" in found[key].cure
    assert key not in {problem.key for problem in problems_of(f"{needed} {setting}", None)}


def test_every_field_is_tried() -> None:
    assert {row.key for row in COUNTS_WITH} == {setting.partition("=")[0] for setting, _ in CASES}


def test_eps_and_moments_that_no_optimizer_uses() -> None:
    """Lion (Chen et al. 2023, algorithm 2) divides by nothing; Adafactor has constants of its own."""
    assert [p.key for p in problems_of("optimizer.name=lion optimizer.eps=1e-6", None)] == ["optimizer.eps"]
    assert [p.key for p in problems_of("optimizer.name=adafactor optimizer.beta1=0.8", None)] == ["optimizer.beta1"]
