"""Sliding-window attention against loops in FP64, and in every layout against one process."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatrain.models.build import build_model
from megatrain.models.parts import window_attention
from megatrain.models.parts.documents import documents_of
from megatrain.models.parts.window_attention import WindowAttention, WindowCore
from megatrain.parallel.layers import Layers
from tests.configs import model_spec
from tests.layouts import ONE_PROCESS, random_positions, run_config

S, B, H, G, K = 11, 3, 4, 2, 5
WINDOWS = {"blocks": ["window", "full", "window"], "attention.window": 5}


def spec(window: int) -> Any:
    sizes = {"hidden_size": H * K, "attention.num_heads": H, "attention.num_kv_heads": G, "attention.window": window}
    return model_spec({"blocks": ["window"], "positions.kind": "learned", **sizes})


def by_loops(query: Tensor, key: Tensor, value: Tensor, window: int, positions_BT: Tensor | None) -> Tensor:
    """Jiang et al. 2023, section 2: a token attends to at most ``window`` tokens, itself the last."""
    rows, cols = query.shape[0], key.shape[0]
    mixed = torch.zeros(rows, B, H, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for row in range(rows):
                own = cols - rows + row
                first = max(0, own - window + 1)
                if positions_BT is not None:
                    first = max(first, own - int(positions_BT[b, own]))
                seen = slice(first, own + 1)
                scores = key[seen, b, h * G // H] @ query[row, b, h] / math.sqrt(K)
                mixed[row, b, h] = scores.softmax(0) @ value[seen, b, h * G // H]
    return mixed


@pytest.mark.parametrize("at_once", [2, 64])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rows", [S, 4])
@pytest.mark.parametrize("window", [1, 3, S, 100])
def test_a_token_sees_so_many_positions(
    window: int, rows: int, documents: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_attention, "_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(window)
    query, key, value = (torch.randn(S, B, heads, K, generator=generator, dtype=torch.float64) for heads in (H, G, G))
    positions = random_positions(generator)[:B, :S] if documents else None
    core = WindowCore(spec(window), Layers(), "layers.0")
    told = None if positions is None else documents_of(positions, None)
    mixed = core(query[S - rows :], key, value, None, told)
    torch.testing.assert_close(mixed, by_loops(query[S - rows :], key, value, window, positions))


def test_blocks_follow_the_pattern() -> None:
    model = build_model(run_config("llama", ONE_PROCESS, model=WINDOWS).model, seed=1)
    kinds = [isinstance(block.attention, WindowAttention) for block in model.layers.values()]
    assert kinds == [True, False, True, True, False], "five blocks of a pattern of three"


def test_what_lies_outside_all_windows_does_not_matter() -> None:
    """Two blocks of a window of 3 reach back 4 positions."""
    model = build_model(
        run_config("mistral", ONE_PROCESS, model={"num_layers": 2, "attention.window": 3}).model, seed=1
    )
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 64
    different = (model(tokens) != model(changed)).any(-1).any(-1)
    assert different.tolist() == [3 <= place <= 3 + 2 * 2 for place in range(12)]


def test_work_grows_with_the_window_and_not_with_the_square_of_the_sequence() -> None:
    """Products as torch counts them: 64 queries at once, which see 127 keys together, the first only their own 64."""
    core = WindowCore(spec(64), Layers(), "layers.0")
    for length in (128, 512):
        query, key, value = (torch.randn(length, B, H, K, device="meta") for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            core(query, key, value, None, None)
        assert counter.get_total_flops() == 4 * B * H * K * 64 * (64 + 127 * (length // 64 - 1))
