"""Which rank reads which sequences, and a split whose slowest stage is not that of the least squares; by hand."""

from megatrain.config.derive import data_parallel_rank
from megatrain.config.schema import ParallelConfig
from megatrain.config.stages import _balanced


def test_ranks_count_tensor_then_context_then_data_then_pipeline() -> None:
    parallel = ParallelConfig(tp=2, cp=2, dp=3, pp=2)
    one_pipeline_stage = [0] * 4 + [1] * 4 + [2] * 4
    assert [data_parallel_rank(parallel, rank) for rank in range(24)] == one_pipeline_stage * 2


def test_the_slowest_stage_decides() -> None:
    """1 3 1 1 | 6 | 1 takes 6; 1 3 | 1 1 | 6 1, which is the most even, 7."""
    assert _balanced([1.0, 3.0, 1.0, 1.0, 6.0, 1.0], 3) == [4, 1, 1]
