"""FP16 steps of a mixture: what a skipped step leaves alone, and side losses under a loss scale."""

from typing import Any

import torch

from tests.layouts import ONE_PROCESS, build_engine, global_batch, run_config
from tests.pool import Pool

MIXTURE = {
    "num_layers": 2,
    "experts.num_experts": 4,
    "experts.hidden_size": 16,
    "router.balance_rate": 0.125,
    "router.balance_loss": 0.5,
    "router.z_loss": 0.5,
}
ROUTER = "layers.1.feed_forward.router.weight"


def first_steps(precision: dict[str, Any]) -> list[tuple[bool, list[float], torch.Tensor]]:
    """Of two steps: whether they were skipped, and then the balance biases and the router's first moment."""
    from megatrain.engine.state import export_state

    engine, seen = build_engine(run_config("llama", ONE_PROCESS, model=MIXTURE, precision=precision)), []
    try:
        for step in (1, 2):
            result = engine.train_step(global_batch(step), step)
            state = {(kind, name): values for kind, name, values in export_state(engine)}
            biases = [bias for row in engine.routers.saved_biases().values() for bias in row]
            seen.append((result.skipped, biases, state["exp_avg", ROUTER].clone()))
            if result.skipped:
                engine.load_loss_scaler_state({"cur_scale": 1024.0})
    finally:
        engine.close()
    return seen


def test_a_skipped_step_moves_no_balance_bias(pool: Pool) -> None:
    first, second = pool.run(first_steps, 1, {"dtype": "fp16", "initial_loss_scale": 2.0**32})[0]
    assert first[0] and not any(first[1])
    assert not second[0] and {abs(bias) for bias in second[1]} <= {0.125, 0.0} and any(second[1])


def test_side_losses_are_scaled_with_the_loss(pool: Pool) -> None:
    """The gradient of a router, most of which is its side losses', whatever the scale; 2^-12 rounds an activation."""
    _, _, expected = pool.run(first_steps, 1, {"dtype": "fp32"})[0][0]
    for scale in (64.0, 4096.0):
        skipped, _, moment = pool.run(first_steps, 1, {"dtype": "fp16", "initial_loss_scale": scale})[0][0]
        assert not skipped
        torch.testing.assert_close(moment, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))
