"""Rotary positions: every stretching against transformers' own, and what turns are by their making."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatrain.models.parts.rotary import SCALINGS, Rotary, turn
from tests.layouts import ONE_PROCESS, run_config

HEADS, WIDTH, LONGEST = 4, 128, 4096  # of a head: enough frequencies for every ramp to have a middle
SHORT, LONG = [1 + 0.01 * i for i in range(WIDTH // 2)], [1 + 0.5 * i for i in range(WIDTH // 2)]
# by ours, what transformers calls the same. Numbers of published models: Llama 3.1, Qwen 2.5, Phi 3
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope.factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"rope.factor": 4.0, "rope.original_max_seq_len": LONGEST}, {"factor": 4.0}),
    "llama3": (
        {"rope.factor": 8.0, "rope.original_max_seq_len": 1024, "rope.theta": 500000.0},
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
            "rope_theta": 500000.0,
        },
    ),
    "yarn": (
        {"rope.factor": 4.0, "rope.original_max_seq_len": 1024, "rope.theta": 1e6},
        {"factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6},
    ),
    "longrope": (
        {
            "rope.factor": 4.0,
            "rope.original_max_seq_len": 1024,
            "rope.short_factors": SHORT,
            "rope.long_factors": LONG,
        },
        {"factor": 4.0, "original_max_position_embeddings": 1024, "short_factor": SHORT, "long_factor": LONG},
    ),
}


def rotary(**model: Any) -> Rotary:
    shape = {"attention.num_heads": HEADS, "hidden_size": HEADS * WIDTH, "max_seq_len": LONGEST}
    return Rotary(run_config("llama", ONE_PROCESS, model={**shape, **model}).model)


def test_every_scaling_has_a_case() -> None:
    assert set(CASES) == set(SCALINGS) - {"none"}


@pytest.mark.parametrize("length", [512, 1024, 1025, LONGEST, 2 * LONGEST])
@pytest.mark.parametrize("kind", CASES)
def test_a_scaling_is_that_of_transformers(kind: str, length: int) -> None:
    ours, its = CASES[kind]
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **its},
    )
    frequencies, size = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    positions = torch.tensor([0, 1, 2, 100, length - 1])
    cos, sin = rotary(**{"rope.scaling": kind, **ours})(positions[:, None], length)
    angles = positions[:, None, None, None].double() * frequencies.double()
    # an angle of 8000 is rounded by 2.4e-4 in FP32, one of 100 by 4e-6; a frequency by 6e-8 of itself
    bound = 1e-6 + 2.4e-7 * float(angles.max())
    torch.testing.assert_close(cos.double(), angles.cos() * size, rtol=0, atol=bound)
    torch.testing.assert_close(sin.double(), angles.sin() * size, rtol=0, atol=bound)


def test_plain_frequencies_are_powers_of_theta() -> None:
    """Su et al. 2021, section 3.2.2: theta_i = theta^(-2i/K)."""
    cos, sin = rotary(**{"rope.theta": 100.0})(torch.tensor([[3]]), 8)
    angles = torch.tensor([3 * 100.0 ** (-2 * i / WIDTH) for i in range(WIDTH // 2)], dtype=torch.float64)
    torch.testing.assert_close(cos.double()[0, 0, 0], angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.double()[0, 0, 0], angles.sin(), rtol=0, atol=1e-6)


def test_a_pair_is_turned_by_its_angle() -> None:
    """Pair (i, i + K/2), against the clock: (1, 0) becomes (cos, sin), and (0, 1) becomes (-sin, cos)."""
    turns = rotary()(torch.arange(5)[:, None], 5)
    for pair in (0, 1, WIDTH // 2 - 1):
        for at, expected in ((pair, ("cos", "sin")), (pair + WIDTH // 2, ("-sin", "cos"))):
            x = torch.zeros(5, 1, 1, WIDTH)
            x[..., at] = 1.0
            turned = turn(x, turns)
            values = {"cos": turns.cos[..., pair], "sin": turns.sin[..., pair], "-sin": -turns.sin[..., pair]}
            assert torch.equal(turned[..., pair], values[expected[0]])
            assert torch.equal(turned[..., pair + WIDTH // 2], values[expected[1]])
            assert int((turned != 0).sum(-1).max()) <= 2, "nothing else moves"


def test_a_score_depends_on_the_distance_alone() -> None:
    """What positions are turned for: query and key 7 apart give the same score wherever they stand."""
    query, key = torch.randn(2, 1, 1, 1, WIDTH, generator=torch.Generator().manual_seed(0))

    def score(at: int, other: int) -> Tensor:
        turns = (rotary()(torch.tensor([[place]]), 512) for place in (at, other))
        return (turn(query, next(turns)) * turn(key, next(turns))).sum()

    torch.testing.assert_close(score(7, 0), score(307, 300), rtol=1e-4, atol=1e-4)
    assert abs(float(score(7, 0) - score(8, 0))) > 0.1


def test_turns_are_fp32_whatever_the_type() -> None:
    """BF16 can't tell position 257 from 256; queries keep their own type."""
    turns = rotary().bfloat16()(torch.tensor([[256], [257]]), 512)
    assert turns.cos.dtype == turns.sin.dtype == torch.float32
    assert not torch.equal(turns.cos[0], turns.cos[1])
    assert turn(torch.ones(2, 1, 1, WIDTH, dtype=torch.bfloat16), turns).dtype == torch.bfloat16
