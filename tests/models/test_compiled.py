"""torch.compile of blocks: whole graphs, and a plain word where it cannot work."""

from typing import Any

import pytest
import torch

from megatrain.models.build import build_model
from megatrain.models.compiled import compile_blocks
from megatrain.models.parts.sublayers import MicroBatch
from megatrain.models.recompute import apply_recompute
from tests.layouts import ONE_PROCESS, run_config


@pytest.mark.parametrize("mode", ["none", "full", "attention"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_no_graph_break_at_tensor_size_1(family: str, mode: str) -> None:
    config = run_config(family, ONE_PROCESS, train={"activation_checkpointing": mode})
    model = build_model(config.model, seed=1).train()
    apply_recompute(model, config.train)
    block = model.layers["0"]
    torch._dynamo.reset()
    x = torch.randn(16, 2, 32, requires_grad=True)
    turns = model.rotary(torch.arange(16)[:, None], 16) if model.rotary else None
    explained = torch._dynamo.explain(block.forward)(x, MicroBatch(torch.tensor([1, 2]), turns=turns))
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


def test_a_graph_break_is_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    assert torch._dynamo.explain(broken)(torch.ones(2)).graph_break_count == 1


def test_without_a_compiler_blocks_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to find C++ compiler.\nmore")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = build_model(run_config("llama", ONE_PROCESS).model, seed=1)
    assert compile_blocks(model) == "Failed to find C++ compiler."
    assert all(module._compiled_call_impl is None for module in model.modules())


MIXTURE = {"experts.num_experts": 4, "num_layers": 2, "experts.hidden_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("llama", {}),
        ("llama", MIXTURE | {"experts.num_shared": 1}),
        ("gpt", MIXTURE | {"experts.capacity": 0.6, "router.score": "sigmoid"}),
    ],
    ids=["dense", "mixture", "drops"],
)
def test_compiled_parts_give_the_same_numbers(family: str, model: dict[str, Any]) -> None:
    config = run_config(family, ONE_PROCESS, model=model)
    plain, compiled = (build_model(config.model, seed=1) for _ in range(2))
    problem = compile_blocks(compiled)
    if problem:
        pytest.skip(problem)
    tokens = torch.arange(64).view(4, 16)
    a, b = plain(tokens, tokens).sum(), compiled(tokens, tokens).sum()
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)  # fused sums in another order
