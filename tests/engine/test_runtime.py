"""Who holds the state of a run: whole weights come to the bits of DeepSpeed, known by its optimizer's class."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.engine.errors import UnknownOptimizerError
from megatrain.engine.zero.norm import sum_of_squares
from megatrain.engine.zero.start import ADAPTERS, adapter_of
from tests.layouts import ONE_PROCESS, Layout, build_engine, global_batch, run_config, train
from tests.pool import Pool

CLASSES = {
    ("fp32", 0): "WholeRuntime",
    ("fp32", 1): "WholeRuntime",
    ("fp32", 2): "Stage1And2Runtime",
    ("fp32", 3): "Stage3Runtime",
    ("bf16", 0): "BF16Runtime",
    ("bf16", 1): "BF16Runtime",
    ("bf16", 2): "Stage1And2Runtime",
    ("bf16", 3): "Stage3Runtime",
    ("fp16", 0): "Stage1And2Runtime",
    ("fp16", 1): "Stage1And2Runtime",
    ("fp16", 3): "Stage3Runtime",
}


def runtimes() -> dict[tuple[str, int], str]:
    found = {}
    for dtype, zero_stage in CLASSES:
        engine = build_engine(run_config("gpt", Layout(zero_stage=zero_stage), precision={"dtype": dtype}))
        found[dtype, zero_stage] = type(engine.runtime).__name__
        engine.close()
    return found


def test_each_type_and_stage_has_its_adapter(pool: Pool) -> None:
    assert pool.run(runtimes, 1)[0] == CLASSES


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    class BF16_Optimizer:  # a subclass or namesake may keep things elsewhere
        pass

    with pytest.raises(UnknownOptimizerError, match=r"test_runtime\.\S*BF16_Optimizer, which megatrain does not know"):
        adapter_of(BF16_Optimizer())
    assert len(ADAPTERS) == 3


def by_deepspeed(family: str, layout: Layout, sections: dict[str, Any]) -> Any:
    with mock.patch("megatrain.engine.zero.start.needs_no_deepspeed", lambda config: False):
        return train(family, layout, **sections)


@pytest.mark.parametrize(
    ("family", "layout", "sections"),
    [
        ("gpt", ONE_PROCESS, {}),
        ("llama", Layout(zero_stage=1), {"optimizer": {"lr": 1e-2, "grad_clip": 0.0}}),
        ("llama", ONE_PROCESS, {"optimizer": {"name": "adafactor", "lr": 1e-2, "grad_clip": 0.5}}),
        ("gpt", Layout(dp=2), {"optimizer": {"name": "lion", "lr": 1e-3, "grad_clip": 0.5}}),
        ("llama", Layout(tp=2), {"optimizer": {"name": "muon", "lr": 1e-2, "grad_clip": 0.5}}),
        ("gpt", Layout(pp=2), {}),
        ("gpt", Layout(dp=2, zero_stage=1), {}),
        ("llama", Layout(cp=2, zero_stage=1), {"optimizer": {"name": "muon", "lr": 1e-2, "grad_clip": 0.5}}),
        ("llama", Layout(dp=2, ep=2, zero_stage=1), {"model": {"experts.num_experts": 4, "experts.per_token": 2}}),
        ("llama", Layout(dp=2, ep=2), {"model": {"experts.num_experts": 4, "experts.per_token": 2}}),
    ],
)
def test_whole_weights_come_to_the_bits_of_deepspeed(
    pool: Pool, family: str, layout: Layout, sections: dict[str, Any]
) -> None:
    theirs = pool.run(by_deepspeed, layout.world_size, family, layout, sections)
    ours = pool.run(train, layout.world_size, family, layout, **sections)
    for own, other in zip(ours, theirs, strict=True):
        assert (own.losses, own.grad_norms, own.evaluation) == (other.losses, other.grad_norms, other.evaluation)
        assert own.state.keys() == other.state.keys()
        for key, (values, _) in own.state.items():
            assert (values == other.state[key][0]).all(), key


def numbers_asked_for() -> int:
    """How often an operator hands a number of the device to the host in a step."""
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func is torch.ops.aten._local_scalar_dense.default)
            return func(*args, **(kwargs or {}))

    engine = build_engine(run_config("gpt", ONE_PROCESS))
    with Watch():
        engine.train_step(global_batch(1), 1)
    engine.close()
    assert len(asked) > 100
    return sum(asked)


def test_a_step_waits_for_no_number(pool: Pool) -> None:
    """But for the flags that the norm is finite and too large, which come as one list."""
    assert pool.run(numbers_asked_for, 1) == [0]


def test_squares_are_added_up_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((3, 5), (700, 600), (7,))]  # the second in parts
    tensors.append(torch.randn(40, 30, generator=generator).T)
    total = sum(float((tensor.double().numpy() ** 2).sum()) for tensor in tensors)
    assert sum_of_squares(tensors).item() == torch.tensor(total).item()
    assert sum_of_squares([torch.full((1 << 20,), 1e-4), torch.ones(1)]).item() == pytest.approx(1.01048576, rel=1e-7)
    assert sum_of_squares([]).item() == 0.0


def step_without_a_gradient() -> tuple[torch.Tensor, torch.Tensor, float]:
    engine = build_engine(run_config("gpt", ONE_PROCESS))
    weight = dict(engine.parameters)["layers.0.feed_forward.up.weight"]
    weight.requires_grad_(False)
    before = weight.clone()
    engine.train_step(global_batch(1), 1)
    decay = engine.config.optimizer.weight_decay * engine.runtime.param_groups[0]["lr"]
    engine.close()
    return before, weight.clone(), decay


def test_a_weight_that_no_loss_depends_on_decays(pool: Pool) -> None:
    [(before, after, decay)] = pool.run(step_without_a_gradient, 1)
    assert decay > 0
    assert torch.equal(after, before * (1 - decay))
