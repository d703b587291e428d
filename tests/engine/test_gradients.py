"""Where accumulated gradients stand, their sum over replicas, and when a good step of FP16 counts."""

import torch
from torch import nn

from tests.pool import Pool


def parameter(**places: float) -> nn.Parameter:
    """A parameter with a gradient in each of ``places``."""
    made = nn.Parameter(torch.zeros(2))
    for place, value in places.items():
        setattr(made, place, torch.full((2,), value))
    return made


def summed() -> list[tuple[str, list[float]]]:
    """After the sum over the ranks: every place that has a gradient, of parameters that have it in one or several."""
    import torch.distributed as dist

    from megatrain.engine.zero.gradients import accumulated_gradient, all_reduce_accumulated

    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    parameters = [
        parameter(grad=1.0 + rank),
        parameter(grad=5.0, grad_accum=10.0 + rank),
        parameter(grad=5.0, grad_accum=6.0, _hp_grad=100.0 + rank),
        parameter(),
    ]
    all_reduce_accumulated(parameters, group)
    assert accumulated_gradient(parameters[-1]) is None
    return [
        (place, getattr(one, place).tolist())
        for one in parameters
        for place in ("grad", "grad_accum", "_hp_grad")
        if getattr(one, place, None) is not None
    ]


def test_the_accumulated_gradient_alone_is_summed(pool: Pool) -> None:
    for found in pool.run(summed, 2):
        assert found == [
            ("grad", [3.0, 3.0]),
            ("grad", [5.0, 5.0]),
            ("grad_accum", [21.0, 21.0]),
            ("grad", [5.0, 5.0]),
            ("grad_accum", [6.0, 6.0]),
            ("_hp_grad", [201.0, 201.0]),
        ]


def loss_scales() -> list[float]:
    """The scale after each thing that happens; it doubles in the step after two good ones."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from megatrain.engine.zero.gradients import count_good_steps_later

    scaler = DynamicLossScaler(
        init_scale=16.0,
        scale_window=2,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.half,
    )
    count = count_good_steps_later(scaler)
    seen = []
    for overflow in (False, False, False, True, False, False, False):
        scaler.update_scale(overflow)  # DeepSpeed does, before it divides the gradients by the scale
        seen.append(float(scaler.cur_scale))
        if not overflow:
            count()
            seen.append(float(scaler.cur_scale))
    return seen


def test_a_good_step_counts_after_its_update_and_an_overflow_at_once(pool: Pool) -> None:
    scales = pool.run(loss_scales, 1)[0]
    good = [16, 16, 16, 16, 16, 32]  # before and after each step's update: the third is made with the scale that it had
    assert scales == [*good, 16, *good], "an overflow halves at once"
