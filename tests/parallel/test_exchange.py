"""What crosses ranks inside the model, and its way back: rows numbered by where they come from."""

import torch
from torch import Tensor

from tests.pool import Pool

SENT = [[1, 3], [0, 2]]  # rows from each rank (row) to each rank (column)
FACTORS = [10.0, 100.0]  # by which each rank's share of the loss weighs what it got


def own_rows(rank: int) -> Tensor:
    """[rows, 2]: the rank in one column, the row's number in the other."""
    count = sum(SENT[rank])
    return torch.stack([torch.full((count,), float(rank)), torch.arange(float(count))], 1).requires_grad_()


def exchanged() -> dict[str, tuple[Tensor, Tensor]]:
    """What this rank got, and the gradient of what it gave."""
    import torch.distributed as dist

    from megatrain.parallel.exchange import all_gather, all_to_all

    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    x = own_rows(rank)
    uneven = all_to_all(x, group, SENT[rank], [sent[rank] for sent in SENT])
    places = torch.arange(float(len(uneven)))[:, None] + 1
    (uneven * places * FACTORS[rank]).sum().backward()
    even = torch.full((4, 1), float(rank)).requires_grad_()
    halves = all_to_all(even, group)
    (halves * FACTORS[rank]).sum().backward()
    gathered_from = torch.tensor([[rank + 1.0], [rank + 5.0]]).requires_grad_()
    gathered = all_gather(gathered_from, group)
    (gathered * torch.arange(4.0)[:, None] * FACTORS[rank]).sum().backward()
    given = {"uneven": x, "even": even, "gathered": gathered_from}
    got = {"uneven": uneven, "even": halves, "gathered": gathered}
    return {name: (got[name].detach(), given[name].grad) for name in got}  # type: ignore[misc]


def test_rows_and_their_gradients_arrive(pool: Pool) -> None:
    first, second = pool.run(exchanged, 2)
    # rank 0 keeps its row 0 and gets none; rank 1 gets rows 1 to 3 of rank 0, then its own two
    assert first["uneven"][0].tolist() == [[0, 0]]
    assert second["uneven"][0].tolist() == [[0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]
    # a row's gradient is its place where it arrived, times that rank's factor
    assert first["uneven"][1].tolist() == [[10, 10], [100, 100], [200, 200], [300, 300]]
    assert second["uneven"][1].tolist() == [[400, 400], [500, 500]]
    for rank, found in enumerate((first, second)):
        assert found["even"][0].flatten().tolist() == [0, 0, 1, 1]
        assert found["even"][1].flatten().tolist() == [10, 10, 100, 100]
        assert found["gathered"][0].flatten().tolist() == [1, 5, 2, 6]
        # both ranks have a share of the loss: (10 + 100) x the row's place
        assert found["gathered"][1].flatten().tolist() == [110 * (2 * rank), 110 * (2 * rank + 1)]
