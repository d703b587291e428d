"""The page that a student reads first computes what megatrain computes: the same weights, batches and steps in both."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import tiny_gpt
from megatrain.config.schema import ResolvedRun
from megatrain.models.build import build_model
from tests.layouts import ONE_PROCESS, global_batch, run_config, train
from tests.pool import Pool

WIDTH, HEADS, INNER, LAYERS = 32, 4, 128, 5
SHAPE: dict[str, Any] = {"attention.num_kv_heads": HEADS, "feed_forward.hidden_size": INNER}
STEPS = 5
EPS = {"eps": 1e-4}  # with AdamW's own, a gradient that is only rounding would move a weight by the whole rate


def config_of() -> ResolvedRun:
    return run_config("gpt", ONE_PROCESS, model=SHAPE, optimizer=EPS)


def its_name(name: str) -> str:
    """The page's name of a weight, by the canonical name."""
    return name.replace("layers.", "blocks.").replace("embedding.", "")


def its_weights(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The page's weights from whole ones under canonical names: its queries, keys and values are matrices apart.

    In ours a head's query rows, key rows and value rows stand one after the other, head by head.
    """
    found = {}
    for name, value in ours.items():
        if "query_key_value" not in name:
            found[its_name(name)] = value
            continue
        by_head = value.unflatten(0, (HEADS, 3, WIDTH // HEADS))
        for number, part in enumerate(("query", "key", "value")):
            found[its_name(name).replace("query_key_value", part)] = by_head[:, number].flatten(0, 1)
    return found


def its_model(config: ResolvedRun) -> tiny_gpt.GPT:
    """The page's model in FP64, with our initial weights."""
    model = tiny_gpt.GPT(64, 16, WIDTH, HEADS, INNER, LAYERS).double()
    ours = build_model(config.model, config.train.seed)
    model.load_state_dict({name: value.double() for name, value in its_weights(dict(ours.named_parameters())).items()})
    return model


def test_logits_and_gradients_are_ours() -> None:
    config, batch = config_of(), global_batch(1)
    ours, its = build_model(config.model, config.train.seed).double(), its_model(config)
    gradients = []
    for model, logits in ((ours, ours(batch.tokens).transpose(0, 1)), (its, its(batch.tokens))):
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(its(batch.tokens), ours(batch.tokens).transpose(0, 1), rtol=1e-10, atol=1e-12)
    mapped = its_weights(gradients[0])
    assert mapped.keys() == gradients[1].keys() == dict(its.named_parameters()).keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, mapped[name], rtol=1e-9, atol=1e-14, msg=name)


def test_steps_are_the_engines(pool: Pool) -> None:
    config = config_of()
    optimizer, schedule = config.optimizer, config.schedule
    model = its_model(config)
    adamw = tiny_gpt.adamw(model, (optimizer.beta1, optimizer.beta2), optimizer.eps, optimizer.weight_decay)
    low = optimizer.lr * schedule.min_lr_ratio
    made = []
    for step in range(1, STEPS + 1):
        rate = tiny_gpt.learning_rate(step, optimizer.lr, schedule.warmup_steps, schedule.decay_steps or 0, low)
        batch = global_batch(step)
        made.append(tiny_gpt.train_step(model, adamw, batch.tokens, batch.labels, rate, optimizer.grad_clip))
    engine = pool.run(train, 1, "gpt", ONE_PROCESS, steps=STEPS, model=SHAPE, optimizer=EPS)[0]
    # FP32 there, FP64 here
    assert engine.losses == pytest.approx([loss for loss, _ in made], rel=1e-5)
    assert engine.grad_norms == pytest.approx([norm for _, norm in made], rel=2e-5)
    assert engine.grad_norms[0] > optimizer.grad_clip > engine.grad_norms[-1], "some steps are clipped"
    whole = {name: torch.from_numpy(part) for (kind, name), (part, _) in engine.state.items() if kind == "weight"}
    for name, weight in its_weights(whole).items():
        its = model.state_dict()[name].numpy()
        scale = max(np.abs(its).max(), optimizer.lr)  # keys' biases move nothing: they stay zero
        error = float(np.abs(weight.numpy() - its).max() / scale)
        assert error < 1e-5, f"{name} differs by {error:.1e}"


def test_its_initial_weights_have_our_sizes() -> None:
    """Both draw them; the deviations agree within what chance does to the smallest matrix (512 numbers: 3 %)."""
    torch.manual_seed(0)
    config = config_of()
    mapped = its_weights(dict(build_model(config.model, config.train.seed).named_parameters()))
    for name, weight in tiny_gpt.GPT(64, 16, WIDTH, HEADS, INNER, LAYERS).named_parameters():
        if weight.dim() == 2:
            assert float(weight.detach().std()) == pytest.approx(float(mapped[name].detach().std()), rel=0.2), name
        else:
            assert torch.equal(weight, mapped[name]), name


def test_the_page_runs_and_needs_torch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_gpt.main(steps=3)
    printed = capsys.readouterr().out
    assert "step 3: loss" in printed
    assert '"""A GPT and its training step' in printed, "what it goes on from"
    source = sys.modules[tiny_gpt.__name__].__file__
    assert source is not None
    with open(source, encoding="utf-8") as file:
        imported = [line for line in file if line.startswith(("import", "from"))]
    assert not [line for line in imported if line.split()[1].split(".")[0] not in {"math", "pathlib", "torch"}]
