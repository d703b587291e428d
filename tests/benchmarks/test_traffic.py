"""The counter of bytes counts known traffic exactly, whichever way it takes."""

from collections import Counter
from typing import Any

from tests.pool import Pool


def known_traffic() -> Any:
    """Ten messages between two ranks, of 1,000 numbers of 4 bytes."""
    import torch
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as functional

    from benchmarks.traffic import Traffic

    rank, x = dist.get_rank(), torch.ones(1000)
    parts = torch.empty(2000)
    with Traffic() as traffic:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        functional.wait_tensor(functional.all_reduce(x, "sum", dist.group.WORLD))
        dist.all_gather_into_tensor(parts, x)
        dist.all_gather(list(parts.chunk(2)), x)
        dist.reduce_scatter_tensor(x, parts)
        dist.all_to_all_single(x, x.clone(), *[[400, 600], [400, 600]] if rank == 0 else [[600, 400]] * 2)
        dist.broadcast(x, 0)
        dist.reduce(x, 1)
        ways = (dist.isend, dist.irecv) if rank == 0 else (dist.irecv, dist.isend)
        for work in dist.batch_isend_irecv([dist.P2POp(way, x, 1 - rank) for way in ways[:1]]):
            work.wait()
        dist.barrier()
    return traffic.bytes, traffic.calls


def test_known_traffic_is_counted(pool: Pool) -> None:
    """Two ranks: an all-reduce of n bytes sends n from each; gathers and scatters of 2 n, and of n, half of it."""
    ranks = pool.run(known_traffic, 2)
    n = 4000
    for rank, (sent, calls) in enumerate(ranks):
        world = {kind: count for (_, kind), count in sent.items()}
        assert world == {
            "all_reduce": 3 * n,
            "all_gather": 2 * n,
            "reduce_scatter": n,
            "all_to_all": 0.6 * n,
            "broadcast": n / 2,
            "reduce": n / 2,
            **({"send": n} if rank == 0 else {}),
        }
        assert Counter(kind for _, kind in calls.elements())["all_reduce"] == 3
