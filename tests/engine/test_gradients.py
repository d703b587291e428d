"""The sum of gradients over replicas, and when a good step of FP16 counts."""

import torch

from tests.pool import Pool


def summed() -> list[list[float]]:
    """Gradients of all ranks, summed each by itself; a world of one sends nothing."""
    import torch.distributed as dist

    from megatrain.engine.zero.gradients import all_reduce_each

    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    gradients = [torch.full((2,), 1.0 + rank), torch.full((3,), 10.0 * rank)]
    all_reduce_each(gradients, group)
    return [gradient.tolist() for gradient in gradients]


def test_each_gradient_is_summed(pool: Pool) -> None:
    for found in pool.run(summed, 2):
        assert found == [[3.0, 3.0], [10.0, 10.0, 10.0]]
    assert pool.run(summed, 1) == [[[1.0, 1.0], [0.0, 0.0, 0.0]]]


def loss_scales() -> list[float]:
    """The scale after each thing that happens; it doubles in the step after two good ones."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from megatrain.engine.zero.loss_scaler import LossScaler

    scaler = DynamicLossScaler(
        init_scale=16.0,
        scale_window=2,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.half,
    )
    count = LossScaler(scaler).count_good_step
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
