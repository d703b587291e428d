"""Learning rates by hand: warm-up, plateau, the middle and the end of each decay, and what comes after."""

import pytest

from megatrain.config.schema import OptimizerConfig, ScheduleConfig
from megatrain.optim.schedule import learning_rate

# peak 1, minimum 0.2, two steps of warm-up, of 20 steps
CASES = {
    "constant": ({}, {1: 0.5, 2: 1.0, 20: 1.0}),
    "cosine": ({"decay_steps": 10}, {1: 0.5, 2: 1.0, 4: 0.2 + 0.4 * (1 + 0.5**0.5), 6: 0.6, 10: 0.2, 15: 0.2}),
    "linear": ({"decay_steps": 10}, {1: 0.5, 2: 1.0, 4: 0.8, 6: 0.6, 10: 0.2, 15: 0.2}),
    "inverse_sqrt": ({}, {1: 0.5, 2: 1.0, 8: 0.5, 18: 1 / 3, 200: 0.2}),
    "wsd": ({"decay_steps": 4}, {1: 0.5, 2: 1.0, 10: 1.0, 16: 1.0, 17: 0.8, 18: 0.6, 20: 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_rates_by_hand(name: str) -> None:
    fields, rates = CASES[name]
    schedule = ScheduleConfig(name=name, warmup_steps=2, min_lr_ratio=0.2, **fields)
    for step, rate in rates.items():
        assert learning_rate(step, 20, schedule, OptimizerConfig(lr=1.0)) == pytest.approx(rate, rel=1e-12), step
