"""Who writes what: every element once, evenly, and near the rank that holds it."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.checkpoint import shares
from megatrain.checkpoint.shares import LocalTensor, WriteRounds, chunk_limit, deal_out


def zero_ranges(sizes: list[int], num_ranks: int) -> list[dict[int, tuple[int, int]]]:
    """As ZeRO 1 and 2 do: all tensors behind each other, cut into equal parts."""
    total, begin, ranges = sum(sizes), 0, []
    share = -(-total // num_ranks)
    for size in sizes:
        held = {}
        for rank in range(num_ranks):
            start, stop = max(begin, rank * share), min(begin + size, (rank + 1) * share)
            if start < stop:
                held[rank] = (start - begin, stop - start)
        ranges.append(held)
        begin += size
    return ranges


def loads(plan: WriteRounds, num_ranks: int) -> list[int]:
    return [sum(chunk.size for chunk in plan.chunks if chunk.owner == rank) for rank in range(num_ranks)]


def require_sound(parts: list[LocalTensor], plan: WriteRounds, num_ranks: int) -> None:
    """Each element in one chunk, each chunk put together from what the ranks hold, a rank at most once in a round."""
    for part in parts:
        chunks = sorted((c.start, c.size, c.first_row) for c in plan.chunks if c.name == part.name)
        assert chunks[0][0] == 0
        assert chunks[-1][0] + chunks[-1][1] == part.rows * part.row_elements
        assert all(a[0] + a[1] == b[0] for a, b in pairwise(chunks))
        assert all(start == row * part.row_elements for start, _, row in chunks)
    for chunk in plan.chunks:
        part = next(part for part in parts if part.name == chunk.name)
        assert part.rows % chunk.chunk_rows == 0 or not part.even
        elements = sorted(i for _, start, size in chunk.pieces for i in range(start, start + size))
        assert elements == list(range(chunk.start, chunk.start + chunk.size))
        for rank, start, size in chunk.pieces:
            begin, count = part.ranges[rank]
            assert begin <= start
            assert start + size <= begin + count
    for round_ in plan.rounds:
        owners = [chunk.owner for chunk in round_]
        assert len(set(owners)) == len(owners) <= num_ranks


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 5), st.sampled_from(["all", "flat", "each"]), st.integers(1, 60))
def test_any_plan_is_sound(tensors: list, num_ranks: int, held: str, limit: int) -> None:
    sizes = [rows * row for rows, row, _ in tensors]
    by_kind = {
        "all": [{rank: (0, size) for rank in range(num_ranks)} for size in sizes],
        "flat": zero_ranges(sizes, num_ranks),
        "each": [zero_ranges([size], num_ranks)[0] for size in sizes],
    }
    parts = [
        LocalTensor(f"t{i}", rows, row, ranges, even)
        for i, ((rows, row, even), ranges) in enumerate(zip(tensors, by_kind[held], strict=True))
    ]
    require_sound(parts, deal_out(parts, num_ranks, limit), num_ranks)


def transformer(ranges: str, num_ranks: int) -> list[LocalTensor]:
    """The tensors of a small Llama: one large embedding, layers, tiny norms."""
    tensors = [(32000, 512)] + [(rows, row) for _ in range(8) for rows, row in [(1536, 512), (512, 512), (2816, 512)]]
    tensors += [(512, 1)] * 16
    sizes = [rows * row for rows, row in tensors]
    held = {
        "all": [{rank: (0, size) for rank in range(num_ranks)} for size in sizes],
        "flat": zero_ranges(sizes, num_ranks),
        "first": [{0: (0, size)} for size in sizes],
    }[ranges]
    return [LocalTensor(f"t{i}", *shape, ranges) for i, (shape, ranges) in enumerate(zip(tensors, held, strict=True))]


def test_the_work_is_spread_evenly() -> None:
    for ranges in ("all", "flat", "first"):
        for num_ranks in (2, 4, 8, 16):
            parts = transformer(ranges, num_ranks)
            plan = deal_out(parts, num_ranks, chunk_limit(parts, num_ranks))
            per_rank = loads(plan, num_ranks)
            mean = sum(per_rank) / num_ranks
            assert max(per_rank) <= 1.3 * mean, f"{ranges}, {num_ranks} ranks: {per_rank}"
            assert len(plan.chunks) <= len(parts) + 8 * num_ranks, "cutting evens out, and makes few files"


def test_what_a_rank_holds_stays_with_it() -> None:
    parts = transformer("flat", 4)
    plan = deal_out(parts, 4, chunk_limit(parts, 4))
    moved = sum(size for chunk in plan.chunks for rank, _, size in chunk.pieces if rank != chunk.owner)
    assert moved <= 0.25 * sum(chunk.size for chunk in plan.chunks)
    copies = deal_out(transformer("all", 4), 4, chunk_limit(parts, 4))
    assert all(chunk.pieces == ((chunk.owner, chunk.start, chunk.size),) for chunk in copies.chunks)


def test_parts_of_other_tensor_ranks_continue_the_grid() -> None:
    part = LocalTensor("w", rows=6 * shares.MIN_CHUNK_ELEMENTS, row_elements=1, ranges={0: (0, 6 * 2**18)}, even=True)
    plan = deal_out([part], 1, shares.MIN_CHUNK_ELEMENTS)
    assert {chunk.chunk_rows for chunk in plan.chunks} == {shares.MIN_CHUNK_ELEMENTS}
    prime = LocalTensor("w", rows=101, row_elements=1, ranges={0: (0, 101)}, even=True)
    assert len(deal_out([prime], 1, 10).chunks) == 1, "no even cut: one chunk"
