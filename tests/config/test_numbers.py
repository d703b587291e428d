"""Numbers that FP32 does not hold."""

import pytest

from megatrain.config.rules.numbers import NUMBER_FIELDS
from tests.config.test_rules import problems_of


@pytest.mark.parametrize(
    ("override", "end", "cure"),
    [
        ("model.rope.theta=5e-324", "below", "1.2e-38, or nearer to the default, 10000.0"),
        ("optimizer.eps=1e-39", "below", "1.2e-38, or nearer to the default, 1e-08"),
        ("optimizer.lr=4e38", "above", "3.4e+38, or nearer to the default, 0.0003"),
    ],
)
def test_they_are_refused(override: str, end: str, cure: str) -> None:
    (problem,) = problems_of(override)
    assert f"{problem.key}={problem.value!r}" == override.replace("4e38", "4e+38")
    assert problem.message.startswith(f"is {end} the numbers of FP32") and cure in problem.cure


def test_the_ends_of_fp32_are_allowed() -> None:
    assert problems_of("model.norm.eps=1.1754943508222875e-38") == []  # 2^-126
    assert problems_of("optimizer.weight_decay=3.4028234663852886e38 optimizer.grad_clip=0") == []
    assert {"model.rope.theta", "optimizer.beta1", "train.peak_tflops", "precision.min_loss_scale"} < set(NUMBER_FIELDS)
