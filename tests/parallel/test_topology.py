"""Where ranks are."""

from megatrain.parallel.topology import Topology


def test_tensor_is_fastest_and_pipeline_slowest() -> None:
    topology = Topology(tp=2, dp=2, pp=2)
    assert topology.groups(["tp"]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups(["dp"]) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups(["pp"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups(["tp", "pp"]) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [topology.coordinate(6, axis) for axis in ("tp", "dp", "pp")] == [0, 1, 1]
