"""One process of the engine equals a training loop written by hand in plain PyTorch."""

import pytest
import torch

from megatrain.models.build import build_model
from megatrain.optim.optimizer import build_optimizer
from megatrain.optim.schedule import learning_rate
from megatrain.spec.parts import parameters
from tests.layouts import ONE_PROCESS, global_batch, run_config, train
from tests.pool import Pool


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_engine_equals_bare_loop(pool: Pool, family: str) -> None:
    config = run_config(family, ONE_PROCESS)
    model = build_model(config.model, config.train.seed)
    optimizer = build_optimizer(list(model.named_parameters()), config.optimizer, parameters(config.model))
    losses, norms = [], []
    for step in range(1, 6):
        batch = global_batch(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, config.schedule, config.optimizer)
        loss = model(batch.tokens, batch.labels).sum() / (batch.labels != -100).sum()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    engine = pool.run(train, 1, family, ONE_PROCESS)[0]
    # FP32: one batch here, micro-batches there
    assert engine.losses == pytest.approx(losses, rel=1e-5)
    assert engine.grad_norms == pytest.approx(norms, rel=2e-5)
