"""The layers that are split over tensor ranks, each by itself against plain torch, with and without a split sequence.

Shapes: S sequence, B micro-batch, D width, O outputs, V vocabulary.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.parallel.layers import Layers
from tests.layouts import Layout, run_config
from tests.pool import Pool

SEQ, BATCH, WIDTH, OUT, VOCAB, PADDING, RANKS = 6, 3, 8, 10, 12, 3, 2
Found = dict[str, Tensor]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    tokens, labels = torch.randint(0, VOCAB - PADDING, (2, BATCH, SEQ), generator=torch.Generator().manual_seed(9))
    labels[0, :4] = -100
    return tokens, labels


def kept(y: Tensor, back: Tensor, x: Tensor, **parameters: nn.Parameter) -> Found:
    """Output and gradients, where ``back`` comes back from the loss."""
    (y * back).sum().backward()
    gradients = {name: parameter.grad for name, parameter in {"x": x, **parameters}.items()}
    return {"y": y.detach(), **{name: gradient for name, gradient in gradients.items() if gradient is not None}}


def filled(module: nn.Module, layers: Layers, seed: int) -> Any:
    """A layer in FP64 with this rank's part of whole weights, numbered by ``seed``."""
    module = module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(layers.local_part(random(seed + number, *layers.whole_shape(parameter)), parameter))
    return module


def on_rank(sequence_parallel: bool) -> tuple[int, dict[str, Found]]:
    """This rank's number, and what each layer gives and takes here."""
    from megatrain.models.parts.loss import sequence_losses
    from megatrain.parallel.mesh import build_mesh, topology_of
    from megatrain.train.build import build_layers

    config = run_config("gpt", Layout(tp=RANKS, sequence_parallel=sequence_parallel))
    mesh = build_mesh(topology_of(config.parallel), torch.device("cpu"))
    layers = build_layers(config, mesh)
    rank, part = mesh.rank, Part(mesh.rank, sequence_parallel)
    found = {}
    column, x = filled(layers.column_linear(WIDTH, OUT, bias=True), layers, 20), part.rows(random(1, SEQ, BATCH, WIDTH))
    back = part.columns(random(2, SEQ, BATCH, OUT))
    found["column"] = kept(column(x), back, x, weight=column.weight, bias=column.bias)
    gate, up = (filled(layers.column_linear(WIDTH, OUT, bias=False), layers, seed) for seed in (30, 31))
    x = part.rows(random(1, SEQ, BATCH, WIDTH))
    both = torch.cat(layers.column_outputs((gate, up), x), -1)
    twice = torch.cat([back, part.columns(random(3, SEQ, BATCH, OUT))], -1)
    found["together"] = kept(both, twice, x, gate=gate.weight, up=up.weight)
    row, x = filled(layers.row_linear(OUT, WIDTH, bias=True), layers, 40), part.columns(random(4, SEQ, BATCH, OUT))
    found["row"] = kept(row(x), part.rows(random(5, SEQ, BATCH, WIDTH)), x, weight=row.weight, bias=row.bias)
    tokens, labels = tokens_and_labels()
    table = filled(layers.vocab_embedding(VOCAB, WIDTH), layers, 50)
    back = part.rows(random(6, SEQ, BATCH, WIDTH)).detach()
    found["embedding"] = kept(layers.embed(table, tokens), back, torch.zeros(0), weight=table.weight)
    table, x = filled(layers.vocab_embedding(VOCAB, WIDTH), layers, 50), part.rows(random(7, SEQ, BATCH, WIDTH))
    logits = layers.hide_tokens_from(VOCAB - PADDING, layers.head_logits(x, table.weight))
    before = logits.detach().clone()  # megatron-core's loss takes the memory of FP32 logits
    losses = sequence_losses(layers, logits, labels)
    found["head"] = kept(losses, random(8, BATCH), x, weight=table.weight) | {"logits": before}
    return rank, found


class Part:
    """What a rank holds: rows of a split sequence, columns of a split width."""

    def __init__(self, rank: int, sequence_parallel: bool):
        self.rank, self.sequence_parallel = rank, sequence_parallel

    def rows(self, x: Tensor) -> Tensor:
        return (x.chunk(RANKS)[self.rank] if self.sequence_parallel else x).clone().requires_grad_()

    def columns(self, x: Tensor) -> Tensor:
        return x.chunk(RANKS, -1)[self.rank].clone().requires_grad_()


def dense() -> dict[str, Found]:
    """The same by plain torch, whole."""

    def leaf(seed: int, *shape: int) -> Any:
        return random(seed, *shape).requires_grad_()

    found = {}
    x, weight, bias = leaf(1, SEQ, BATCH, WIDTH), leaf(20, OUT, WIDTH), leaf(21, OUT)
    found["column"] = kept(F.linear(x, weight, bias), random(2, SEQ, BATCH, OUT), x, weight=weight, bias=bias)
    x, gate, up = leaf(1, SEQ, BATCH, WIDTH), leaf(30, OUT, WIDTH), leaf(31, OUT, WIDTH)
    both = torch.stack([F.linear(x, gate), F.linear(x, up)])
    back = torch.stack([random(2, SEQ, BATCH, OUT), random(3, SEQ, BATCH, OUT)])
    found["together"] = kept(both, back, x, gate=gate, up=up)
    x, weight, bias = leaf(4, SEQ, BATCH, OUT), leaf(40, WIDTH, OUT), leaf(41, WIDTH)
    found["row"] = kept(F.linear(x, weight, bias), random(5, SEQ, BATCH, WIDTH), x, weight=weight, bias=bias)
    tokens, labels = tokens_and_labels()
    weight = leaf(50, VOCAB, WIDTH)
    embedded = F.embedding(tokens, weight).transpose(0, 1)
    found["embedding"] = kept(embedded, random(6, SEQ, BATCH, WIDTH), torch.zeros(0), weight=weight)
    x, weight = leaf(7, SEQ, BATCH, WIDTH), leaf(50, VOCAB, WIDTH)
    logits = F.linear(x, weight)[..., : VOCAB - PADDING]
    losses = F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none").sum(1)
    found["head"] = kept(losses, random(8, BATCH), x, weight=weight)
    found["head"]["logits"] = F.pad(logits.detach(), (0, PADDING), value=-torch.inf)
    return found


# what of each layer stands on a rank: "rows" of the sequence where it is split, else a dim of the tensor, or all of it
HELD: dict[str, dict[str, str | int | None]] = {
    "column": {"y": -1, "x": "rows", "weight": 0, "bias": 0},
    "together": {"y": -1, "x": "rows", "gate": 0, "up": 0},
    "row": {"y": "rows", "x": -1, "weight": 1, "bias": None},
    "embedding": {"y": "rows", "weight": 0},
    "head": {"y": None, "x": "rows", "weight": 0, "logits": -1},
}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_split_layers_are_parts_of_whole_ones(pool: Pool, sequence_parallel: bool) -> None:
    whole = dense()
    for rank, found in pool.run(on_rank, RANKS, sequence_parallel):
        for layer, held in HELD.items():
            assert found[layer].keys() == held.keys()
            for name, dim in held.items():
                expected = whole[layer][name]
                if dim == "rows":
                    expected = expected.chunk(RANKS)[rank] if sequence_parallel else expected
                elif dim is not None:
                    expected = expected.chunk(RANKS, int(dim))[rank]
                if (layer, name) == ("together", "y"):
                    expected = torch.cat(expected.unbind(), -1)
                error = 1e-5 if layer == "head" else 1e-12  # the loss is FP32
                own = found[layer][name].double()
                torch.testing.assert_close(own, expected, rtol=error, atol=error, msg=f"{layer}: {name}")
