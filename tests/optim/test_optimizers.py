"""Lion and Muon against their papers' formulas, and which parameters fall into which group."""

import math

import pytest
import torch
from torch import nn

from megatrain.config.schema import OptimizerConfig
from megatrain.models.build import build_model
from megatrain.optim.lion import Lion
from megatrain.optim.muon import orthogonalize
from megatrain.optim.optimizer import build_optimizer, parameter_groups
from megatrain.spec.parameter import Parameter, Role
from megatrain.spec.parts import parameters
from tests.layouts import ONE_PROCESS, run_config


def test_lion_is_algorithm_2() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    expected, momentum = weight.detach().clone(), torch.zeros(3)
    for step in range(3):
        gradient = torch.tensor([0.3, -0.1, 0.0]) * (-1.0) ** step
        weight.grad = gradient.clone()
        optimizer.step()
        direction = torch.sign(0.9 * momentum + 0.1 * gradient)
        expected = expected - 0.1 * (direction + 0.5 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], momentum)
    assert optimizer.state[weight]["step"] == 3


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix) / (0.2 * math.sqrt(max(shape)))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = (left.T @ result @ right.T).diagonal()
    assert ((values > 0.6) & (values < 1.3)).all(), "five iterations bring singular values so near to 1"
    off = left.T @ result @ right.T - torch.diag(values)
    assert off.abs().max() < 1e-4, "singular vectors stay"


def test_an_update_of_muon_is_as_large_as_adamws() -> None:
    update = orthogonalize(torch.randn(32, 96, generator=torch.Generator().manual_seed(1)))
    assert 0.1 < float(update.pow(2).mean().sqrt()) < 0.3


ROWS = {"queries": (0, 1, 2, 3, 8, 9, 10, 11), "keys": (4, 5, 12, 13), "values": (6, 7, 14, 15)}
"""Of a fused matrix of 2 groups of 2 query heads of width 2: group by group the queries, the key and the value."""


@pytest.mark.parametrize("split", [True, False])
def test_muon_orthogonalises_queries_keys_and_values_by_themselves(split: bool) -> None:
    """Against the iteration's polynomial applied to singular values, of a real model's fused matrix."""
    shape = {
        "hidden_size": 8,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 2,
        "num_layers": 1,
        "feed_forward.hidden_size": 12,
    }
    spec = run_config("llama", ONE_PROCESS, model=shape).model
    model = build_model(spec, seed=1).double()
    config = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.5, muon_split_qkv=split)
    optimizer = build_optimizer(list(model.named_parameters()), config, parameters(spec))
    weight = model.layers["0"].attention.query_key_value.weight
    expected = weight.detach() * (1 - 0.1 * 0.5)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    whole = weight.grad
    for rows in ROWS.values() if split else (range(16),):
        left, values, right = torch.linalg.svd(whole[list(rows)], full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        expected[list(rows)] -= 0.1 * 0.2 * math.sqrt(max(len(rows), 8)) * left @ torch.diag(values) @ right
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-5)  # the iteration itself runs in FP32


def test_adafactor_is_torchs() -> None:
    """A matrix and a vector of one process, as torch.optim.Adafactor updates them where its rate does not decay."""
    config = OptimizerConfig(name="adafactor", lr=1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    start = {"layers.0.feed_forward.up.weight": torch.randn(12, 5), "final_norm.weight": torch.ones(5)}
    mine = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = [nn.Parameter(value.clone()) for value in start.values()]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    table = {
        "layers.0.feed_forward.up.weight": Parameter("up", (12, 5), Role.MATRIX, "normal"),
        "final_norm.weight": Parameter("norm", (5,), Role.NORM, "ones"),
    }
    a = build_optimizer(list(mine.items()), config, table)
    b = torch.optim.Adafactor(groups, lr=1e-2, eps=(1e-30, 1e-3))
    for _ in range(6):
        for ours, other in zip(mine.values(), theirs, strict=True):
            ours.grad = torch.randn_like(ours) * 10 ** torch.randn(())
            other.grad = ours.grad.clone()
        a.step()
        b.step()
    for ours, other in zip(mine.values(), theirs, strict=True):
        torch.testing.assert_close(ours, other)


def test_muons_adamw_is_torchs() -> None:
    config = OptimizerConfig(name="muon", lr=1e-2)
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    table = {"final_norm.weight": Parameter("final_norm.weight", (5,), Role.NORM, "ones")}
    a = build_optimizer([("final_norm.weight", mine)], config, table)
    b = torch.optim.AdamW([theirs], lr=1e-2, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0)
    for _ in range(4):
        mine.grad = torch.randn(5)
        theirs.grad = mine.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(mine, theirs)


def groups_of(**options: object) -> dict[str, dict]:
    spec = run_config("llama", ONE_PROCESS).model
    model = build_model(spec, seed=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    config = OptimizerConfig.model_validate(options)
    groups = parameter_groups(list(model.named_parameters()), config, parameters(spec))
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[parameter]: group for group in groups for parameter in group["params"]}


def test_matrices_decay_and_vectors_do_not() -> None:
    groups = groups_of(weight_decay=0.2)
    assert groups["layers.0.attention.output.weight"]["weight_decay"] == 0.2
    assert groups["layers.0.attention_norm.weight"]["weight_decay"] == 0.0


def test_of_the_rules_that_fit_the_last_that_sets_a_field_gives_it() -> None:
    rules = [
        {"pattern": "layers.*", "lr_scale": 0.5},
        {"pattern": "layers.0.*", "lr_scale": 0.1, "weight_decay": 0.0},
        {"pattern": "*norm.weight", "weight_decay": 0.3},
        {"pattern": "layers.0.*up.weight", "lr_scale": 1.0},
    ]
    groups = groups_of(weight_decay=0.2, rules=rules)
    expected = {  # lr_scale, weight_decay
        "head.weight": (1.0, 0.2),
        "final_norm.weight": (1.0, 0.3),
        "layers.1.feed_forward.up.weight": (0.5, 0.2),
        "layers.1.attention_norm.weight": (0.5, 0.3),
        "layers.0.attention_norm.weight": (0.1, 0.3),
        "layers.0.feed_forward.down.weight": (0.1, 0.0),
        "layers.0.feed_forward.up.weight": (1.0, 0.0),
    }
    assert {name: (groups[name]["lr_scale"], groups[name]["weight_decay"]) for name in expected} == expected


def test_muon_takes_the_matrices_of_blocks() -> None:
    groups = groups_of(name="muon")
    orthogonal = {name for name, group in groups.items() if group["orthogonal"]}
    assert "layers.3.attention.query_key_value.weight" in orthogonal
    assert not orthogonal & {"embedding.word.weight", "head.weight", "final_norm.weight"}
    assert groups["layers.3.attention.output.weight"]["moments"] == ("exp_avg",)
