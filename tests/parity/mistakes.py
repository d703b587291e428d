"""Mistakes that a layout can have, to be planted in a live engine before its first step."""

import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.reading.fields import with_value


def modules(engine: Any, kind: type) -> list[nn.Module]:
    return [module for module in engine.model.modules() if isinstance(module, kind)]


def forget_a_weight(engine: Any) -> None:
    """Its gradient is zero, so its step too."""
    dict(engine.parameters)["layers.0.feed_forward.up.weight"].register_hook(lambda gradient: gradient * 0)


def forget_the_sum_of_norm_gradients(engine: Any) -> None:
    for name, parameter in engine.parameters:
        if "norm" in name and parameter._backward_hooks:
            parameter._backward_hooks.clear()


def shift_the_vocabulary(engine: Any) -> None:
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    if engine.mesh.coordinate("tp") == 1:
        for module in modules(engine, VocabParallelEmbedding):
            module.vocab_start_index += 1  # type: ignore[operator, assignment]
            module.vocab_end_index += 1  # type: ignore[operator, assignment]


def sum_tied_gradients_twice(engine: Any) -> None:
    reduce = engine._sum_over_copies
    engine._sum_over_copies = lambda: (reduce(), reduce())


def average_averages(engine: Any) -> None:
    engine._global_loss_tokens = lambda labels: (labels != -100).sum() * engine.mesh.topology.dp


def drop_the_last_micro_batch(engine: Any) -> None:
    split = engine._split
    engine._split = lambda inputs: split(inputs)[:-1]


def forget_a_backward(engine: Any) -> None:
    backward, calls = engine.runtime.backward, []

    def all_but_one(loss: Tensor) -> None:
        calls.append(1)
        backward(loss if len(calls) < 4 else loss * 0)

    engine.runtime.backward = all_but_one


def count_positions_from_zero(engine: Any) -> None:
    from megatrain.models.parts.rotary import Rotary

    for module in modules(engine, Rotary):
        turn = module.forward
        module.forward = lambda at, length, turn=turn: turn(at - at.min(), length)  # type: ignore[method-assign]


def overflow_alone(engine: Any) -> None:
    engine.runtime.optimizer.has_overflow = lambda partition_gradients=True: engine.mesh.rank == 1


def average_instead_of_sum(engine: Any) -> None:
    engine._gradient_factor = lambda: 1


def count_a_tied_copy_twice(engine: Any) -> None:
    from megatrain.parallel.marks import mark

    for _, parameter in engine.parameters:
        mark(parameter, counted_elsewhere=False)


def scatter_the_wrong_chunk(engine: Any) -> None:
    for name, parameter in engine.parameters:
        if name == "layers.2.attention.query_key_value.weight":
            parameter.data.copy_(parameter.data.flip(0))


def sum_experts_over_the_wrong_group(engine: Any) -> None:
    object.__setattr__(engine.mesh, "edp_group", engine.mesh.ep_group)


def update_nothing(engine: Any) -> None:
    scale_the_rate(engine, 0.0)


def double_the_rate(engine: Any) -> None:
    scale_the_rate(engine, 2.0)


def scale_the_rate(engine: Any, factor: float) -> None:
    for group in engine.runtime.param_groups:
        group["lr_scale"] *= factor


def forget_the_decay(engine: Any) -> None:
    for group in engine.runtime.param_groups:
        group["weight_decay"] = 0.0


def count_replicated_norms_on_each_rank(engine: Any) -> None:
    if hasattr(engine.runtime, "optimizer"):
        engine.runtime.optimizer.mpu.get_tensor_model_parallel_rank = lambda: 0
    else:  # whole weights
        engine.runtime._counts = lambda weight: True


def sum_replicas_in_16_bits(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """In the place of the engine's sum without ZeRO."""
    for gradient in gradients:
        total = gradient.to(torch.bfloat16)
        dist.all_reduce(total, group=group)
        gradient.copy_(total)


def reduce_in_16_bits(config: Any) -> dict[str, Any]:
    """In the place of DeepSpeed's config."""
    from megatrain.config.deepspeed import deepspeed_config

    return deepspeed_config(config) | {"communication_data_type": "bf16"}


def in_place_of(name: str, other: Callable[..., Any]) -> Any:
    """A mistake in what the engine imports."""
    return unittest.mock.patch(f"megatrain.engine.{name}", other)


def move_biases_the_wrong_way(engine: Any) -> None:
    rate = engine.config.model.router.balance_rate
    model = with_value(engine.routers.config, "router.balance_rate", -rate)
    engine.routers.config = model


def clip_twice_as_hard(engine: Any) -> None:
    """Takes the norm for twice what it is, when clipping."""
    unscale = engine.runtime.optimizer.unscale_and_clip_grads
    engine.runtime.optimizer.unscale_and_clip_grads = lambda gradients, norm: unscale(gradients, 2 * norm)
