"""Ulysses where the key/value heads do not divide over the ranks: each rank's queries meet their own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.layouts import Layout
from tests.pool import Pool

SIZE, SEQ, HEADS, KEY_HEADS, WIDTH = 4, 8, 8, 2, 4


class Core(nn.Module):
    """Causal attention of whole sequences, [S, B, heads, K]."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3)


def inputs() -> list[Tensor]:
    """Query, key and value of all positions."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SEQ, 2, heads, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


def attend() -> tuple[int, Tensor, list[Tensor]]:
    """This rank's place, its part of the result, and of the gradients of its inputs."""
    from megatrain.parallel.context import build_context
    from megatrain.parallel.mesh import build_mesh, topology_of
    from tests.layouts import run_config

    parallel = run_config("gpt", Layout(cp=SIZE, cp_method="ulysses")).parallel
    context = build_context(parallel, build_mesh(topology_of(parallel), torch.device("cpu")))
    own = [x.chunk(SIZE)[context.rank].clone().requires_grad_() for x in inputs()]
    mixed = context.attention(Core())(*own)
    mixed.square().sum().backward()
    return context.rank, mixed.detach(), [x.grad for x in own if x.grad is not None]


def test_two_key_heads_over_four_ranks(pool: Pool) -> None:
    whole = [x.requires_grad_() for x in inputs()]
    expected = Core()(*whole)
    expected.square().sum().backward()
    for rank, mixed, gradients in pool.run(attend, SIZE):
        torch.testing.assert_close(mixed, expected.detach().chunk(SIZE)[rank])
        for gradient, x in zip(gradients, whole, strict=True):
            assert x.grad is not None
            torch.testing.assert_close(gradient, x.grad.chunk(SIZE)[rank])
