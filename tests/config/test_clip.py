"""A schedule that is longer than the run is cut, and says so."""

import pytest

from megatrain.config.clip import clipped
from megatrain.config.load import load_config
from megatrain.optim.schedule import learning_rate


@pytest.mark.parametrize(
    ("overrides", "warmup", "decay", "notes"),
    [
        (
            "--schedule.warmup_steps=50", 20, 20,
            ["schedule.warmup_steps: 50 steps do not fit into train.steps = 20; cut to 20"],
        ),
        ("--schedule.warmup_steps=20", 20, 20, []),
        ("--schedule.name=constant --schedule.warmup_steps=21", 20, None, ["schedule.warmup_steps: 21 steps"]),
        ("--schedule.name=wsd --schedule.warmup_steps=18", 18, 2, []),
        ("--schedule.name=wsd --schedule.warmup_steps=19", 19, 1, ["schedule.decay_steps: 2 steps"]),
        ("--schedule.name=wsd --schedule.decay_steps=30", 0, 20, ["schedule.decay_steps: 30 steps"]),
        (
            "--schedule.name=wsd --schedule.warmup_steps=50 --schedule.decay_steps=30", 19, 1,
            ["schedule.warmup_steps: 50 steps do not fit into train.steps = 20; cut to 19", "schedule.decay_steps: 30"],
        ),
        ("--schedule.decay_steps=100 --schedule.warmup_steps=50", 20, 100, ["schedule.warmup_steps: 50"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_cut(overrides: str, warmup: int, decay: int | None, notes: list[str]) -> None:
    resolved = load_config([], ["--train.steps=20", *overrides.split()]).with_derived(1)
    schedule = resolved.config.schedule
    assert (schedule.warmup_steps, schedule.decay_steps) == (warmup, decay)
    assert len(resolved.notes) == len(notes)
    assert all(told.startswith(note) for told, note in zip(resolved.notes, notes, strict=True))
    assert clipped(resolved.config) == (resolved.config, [])
    rates = [learning_rate(step, 20, schedule, resolved.config.optimizer) for step in range(1, 21)]
    assert 0.95 * 3e-4 <= max(rates) <= 3e-4 and min(rates) > 0.0, "the run comes to its peak"


def test_one_step_of_any_schedule() -> None:
    for name in ("cosine", "linear", "inverse_sqrt", "constant", "wsd"):
        overrides = ["--train.steps=1", f"--schedule.name={name}", "--schedule.warmup_steps=2000"]
        config = load_config([], overrides).with_derived(1).config
        assert learning_rate(1, 1, config.schedule, config.optimizer) > 0.0
