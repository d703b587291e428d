"""Dropout's modules: the reference's masks, and what any dropout must be (Srivastava et al. 2014)."""

import math

import pytest
import torch
from torch import Tensor

from megatrain.parallel.dropout import AttentionDropout, Dropout, dropout_keys
from tests.reference import dropout as reference

SEED, CHANCE, PLACE = 11, 0.3, "layers.1.attention"
IDS = [0, 5, 2**33 + 5, 2**48 + 1]


def dropped(x: Tensor, ids: list[int], place: str = PLACE, seed: int = SEED, training: bool = True) -> Tensor:
    """By the product's module: [S, B, D] activations, or [B, H, S, S] probabilities."""
    if x.dim() == 4:
        module = AttentionDropout(CHANCE, place).train(training)
    else:
        module = Dropout(CHANCE, place, lambda rows, device: torch.arange(rows, device=device)).train(training)
    return module(x, dropout_keys(seed, torch.tensor(ids)))


@pytest.mark.parametrize("shape", [(4, 16, 24), (4, 3, 16, 16)], ids=str)
def test_masks_and_gradients_equal_the_reference(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks = reference.Dropout(CHANCE, SEED, IDS)
    expected = masks.probabilities(x, PLACE) if len(shape) == 4 else masks.activations(x, PLACE)
    ours = dropped(x, IDS) if len(shape) == 4 else dropped(x.transpose(0, 1), IDS).transpose(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    outer = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(y, x, outer)[0] for y in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    assert torch.equal(gradients[0], torch.where(expected == 0, 0.0, outer / (1 - CHANCE)))


@pytest.mark.parametrize("shape", [(64, 4, 64), (4, 4, 64, 64)], ids=str)
def test_each_element_drops_for_itself(shape: tuple[int, ...]) -> None:
    """Masks of two samples, places or seeds agree as often as chance has it, and so do neighbours in one."""
    x = torch.ones(shape)
    kept = dropped(x, IDS) > 0
    expected, error = CHANCE**2 + (1 - CHANCE) ** 2, 5 / math.sqrt(x.numel() / 4)
    assert abs(float(kept.float().mean()) - (1 - CHANCE)) < error / 2
    assert torch.equal(dropped(x, IDS), kept / (1 - CHANCE))
    others = {
        "place": dropped(x, IDS, "layers.2.attention") > 0,
        "seed": dropped(x, IDS, seed=12) > 0,
        "sample": dropped(x, [1, 6, 2**33 + 6, 2**48 + 2]) > 0,
        **{f"dim {dim}": kept.roll(1, dim) for dim in range(len(shape))},
    }
    for what, other in others.items():
        assert abs(float((kept == other).float().mean()) - expected) < error, what
    assert torch.equal(dropped(x, IDS, training=False), x)
