"""Where ranks are."""

import pytest

from megatrain.parallel.topology import Topology


def test_tensor_is_fastest_and_pipeline_slowest() -> None:
    topology = Topology(tp=2, dp=2, pp=2)
    assert topology.groups(["tp"]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups(["dp"]) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups(["pp"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups(["tp", "pp"]) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert topology.groups(["cp", "dp"]) == topology.groups(["dp"])
    assert [topology.coordinate(6, axis) for axis in ("tp", "dp", "pp")] == [0, 1, 1]


def test_experts_share_out_the_context_and_data_ranks() -> None:
    topology = Topology(tp=2, cp=2, dp=2, ep=2)
    assert topology.groups(["cp"]) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups(["cp", "dp"]) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert topology.groups(["ep"]) == topology.groups(["cp"]), "context ranks are the nearest, so they share experts"
    assert topology.groups(["edp"]) == topology.groups(["dp"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups(["tp", "ep", "pp"]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [topology.coordinate(6, axis) for axis in ("tp", "cp", "dp", "pp", "ep", "edp")] == [0, 1, 1, 0, 1, 1]
    wider = Topology(cp=2, dp=2, pp=2, ep=4)
    assert wider.groups(["ep"]) == [[0, 1, 2, 3], [4, 5, 6, 7]] and wider.edp == 1


def test_experts_must_divide_the_ranks_that_they_share_out() -> None:
    with pytest.raises(ValueError, match="ep 4 does not divide the cp 2 x dp 3"):
        Topology(cp=2, dp=3, ep=4)
