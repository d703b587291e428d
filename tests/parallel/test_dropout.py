"""Every layout of two ranks has parts of one process's masks; tests/reference/test_dropout.py has the formula."""

import pytest
import torch
from torch import Tensor

from megatrain.parallel.dropout import dropout_keys
from megatrain.parallel.layers import Layers
from tests.layouts import ONE_PROCESS, Layout, run_config
from tests.pool import Pool

SEQ, BATCH, WIDTH, HEADS, CHANCE, SITE = 16, 3, 8, 4, 0.4, "layers.2.attention"
LAYOUTS = (
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(cp=2),
    Layout(cp=2, cp_method="ulysses"),
)


def keys() -> Tensor:
    return dropout_keys(5, torch.tensor([0, 7, 2**40]))


def masks(layers: Layers, num_rows: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Which activations [S, B, D] and which probabilities [B, H, S, S] stay, of those that are here."""
    activations, probabilities = layers.dropout(CHANCE, SITE), layers.attention_dropout(CHANCE, SITE)
    kept = activations(torch.ones(num_rows, BATCH, WIDTH), keys())
    return kept > 0, probabilities(torch.ones(BATCH, num_heads, SEQ, SEQ), keys()) > 0


def masks_on_rank() -> list[tuple[int, Tensor, Tensor]]:
    from megatrain.parallel.mesh import build_mesh, topology_of
    from megatrain.train.build import build_layers

    found = []
    for layout in LAYOUTS:
        config = run_config("gpt", layout)
        mesh = build_mesh(topology_of(config.parallel), torch.device("cpu"))
        layers = build_layers(config, mesh)
        splits_rows = layout.sequence_parallel or layout.cp > 1
        splits_heads = layout.tp > 1 or layout.cp_method == "ulysses"
        made = masks(layers, SEQ // (1 + splits_rows), HEADS // (1 + splits_heads))
        found.append((mesh.rank, *made))
    return found


def test_a_rank_drops_what_one_process_drops_there(pool: Pool) -> None:
    rows, heads = masks(Layers(), SEQ, HEADS)
    chunks = rows.chunk(4)  # all_gather's ranks hold the first and the last, and the two between
    whole, halves = (rows, rows), rows.chunk(2)
    zigzag = torch.cat([chunks[0], chunks[3]]), torch.cat([chunks[1], chunks[2]])
    expected = [(whole, heads.chunk(2, 1)), (halves, heads.chunk(2, 1)), (zigzag, (heads, heads)),
                (halves, heads.chunk(2, 1))]  # fmt: skip
    for made in pool.run(masks_on_rank, 2):
        for layout, (own_rows, own_heads), (rank, found_rows, found_heads) in zip(LAYOUTS, expected, made, strict=True):
            assert torch.equal(found_rows, own_rows[rank]), layout
            assert torch.equal(found_heads, own_heads[rank]), layout


@pytest.mark.parametrize("chance", [0.1, 0.5])
def test_what_stays_is_scaled_so_that_the_mean_stays(chance: float) -> None:
    """Srivastava et al. 2014, section 10: each element is dropped with ``chance``, else divided by 1 - chance."""
    x = torch.ones(64, BATCH, 256)
    y = Layers().dropout(chance, SITE)(x, keys())
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - chance))}
    deviation = (chance / (1 - chance) / x.numel()) ** 0.5
    assert abs(float(y.mean()) - 1) < 4 * deviation
    assert run_config("gpt", ONE_PROCESS).model.dropout == 0.0 and torch.equal(Layers().dropout(0.0, SITE)(x, None), x)
