"""Functions of a few numbers against the reference over many arguments: schedules, rotary positions, optimizers."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from megatrain.config.derive import resolve
from megatrain.models.parts.rotary import Rotary, turn
from megatrain.optim.optimizer import build_optimizer
from megatrain.optim.schedule import learning_rate
from megatrain.spec.parameter import Parameter, Role
from tests.configs import model_spec, run_config_of
from tests.reference.files import dotted
from tests.reference.optimizers import State, update_of
from tests.reference.rotary import turned
from tests.reference.rules import decay_and_scale
from tests.reference.runs import LLAMA3, LONGROPE, YARN
from tests.reference.schedules import rate


@pytest.mark.parametrize("name", ["cosine", "linear", "inverse_sqrt", "constant", "wsd"])
def test_rates_of_all_steps(name: str) -> None:
    for warmup, decay, low, steps in itertools.product([0, 1, 4], [None, 5, 30], [0.0, 0.3], [7, 20]):
        schedule = {"name": name, "warmup_steps": warmup, "min_lr_ratio": low}
        sections = {"schedule": {**schedule, "decay_steps": decay}, "train": {"steps": steps}, "optimizer": {"lr": 0.7}}
        config = resolve(run_config_of(sections), 1)
        ours = [learning_rate(step, steps, config.schedule, config.optimizer) for step in range(1, steps + 1)]
        expected = [rate(step, steps, {**schedule, "decay_steps": decay}, 0.7) for step in range(1, steps + 1)]
        assert ours == pytest.approx(expected, rel=1e-12, abs=1e-15), (warmup, decay, low, steps)


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rope.scaling": "linear", "rope.factor": 3.0},
        {"rope.scaling": "dynamic", "rope.factor": 3.0, "rope.original_max_seq_len": 16},
        LLAMA3,
        YARN,
        {**YARN, "rope.attention_factor": 0.8},
        LONGROPE,
        {**LONGROPE, "rope.attention_factor": 1.7, "rope.original_max_seq_len": None},
    ],
    ids=str,
)
def test_turns_at_many_positions(scaling: dict[str, Any]) -> None:
    model = {
        "family": "llama",
        "hidden_size": 32,
        "attention.num_heads": 4,
        "attention.head_width": 8,
        "max_seq_len": 64,
        **scaling,
    }
    config = model_spec(model)
    x = torch.randn(2, 40, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for length in (8, 16, 17, 40):
        positions = torch.arange(length).expand(2, -1)
        ours = turn(x[:, :length].transpose(0, 1).float(), Rotary(config)(positions.T, length)).transpose(0, 1)
        expected = turned(x[:, :length], positions, dotted(config.model_dump()), length)
        # FP32: an angle of 40 is rounded by 2e-6
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5)


SHAPES = {
    "embedding.word.weight": (12, 6),
    "head.weight": (12, 6),
    "layers.0.attention.output.weight": (6, 6),
    "layers.0.feed_forward.up.weight": (16, 6),
    "layers.0.feed_forward.down.weight": (6, 16),
    "layers.0.attention_norm.weight": (6,),
    "layers.0.attention.output.bias": (6,),
    "layers.1.feed_forward.router.weight": (4, 6),
    "layers.1.feed_forward.experts.up": (4, 6, 5),
}


def entry(name: str, shape: tuple[int, ...]) -> Parameter:
    """A row of the model's table; what a weight begins with does not matter here."""
    roles = {1: Role.BIAS, 2: Role.MATRIX, 3: Role.EXPERTS}
    special = {"embedding": Role.TABLE, "head": Role.HEAD, "router": Role.HEAD}
    role = next((role for word, role in special.items() if word in name.split(".")), roles[len(shape)])
    return Parameter(name, shape, role, "zeros")


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_many_updates_of_every_kind_of_weight(name: str) -> None:
    """Gradients of all sizes, of which some stay zero: what stands in the roots and beside them counts."""
    rules = [{"pattern": "layers.1.*", "lr_scale": 3.0, "weight_decay": 0.7}, {"pattern": "*norm*", "lr_scale": 0.5}]
    settings = {"name": name, "lr": 0.03, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.2, "rules": rules}
    config = run_config_of({"optimizer": {**settings, "muon_momentum": 0.7}}).optimizer
    shapes = {key: shape for key, shape in SHAPES.items() if name != "adafactor" or len(shape) < 3}
    random = torch.Generator().manual_seed(1)
    weights = {key: torch.randn(shape, generator=random) * 0.1 for key, shape in shapes.items()}
    parameters = [(key, nn.Parameter(weight.clone())) for key, weight in weights.items()]
    optimizer = build_optimizer(parameters, config, {key: entry(key, shape) for key, shape in shapes.items()})
    expected, kept = {key: weight.double() for key, weight in weights.items()}, {key: State() for key in weights}
    for t in range(1, 9):
        rate = 0.03 / t
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        for key, parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=random) * 10.0 ** -(t % 4)
            gradient[0] = 0.0
            parameter.grad = gradient
            decay, scale = decay_and_scale(key, gradient, config.model_dump())
            update = update_of(name, key, gradient)
            arguments = expected[key], gradient.double(), kept[key], t, rate * scale, decay, config.model_dump()
            expected[key] = update(*arguments)
        optimizer.step()
    for key, parameter in parameters:
        change = float((expected[key] - weights[key]).abs().max())
        error = float((parameter.double() - expected[key]).abs().max())
        assert error < 2e-5 * change, f"{key}: {error:.1e} of a change by {change:.1e}"  # FP32, and Muon's iteration
