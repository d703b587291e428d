"""Where ranks are, and how layers are split."""

import pytest

from megatrain.parallel.topology import Topology, split_layers


def test_tensor_is_fastest_and_pipeline_slowest() -> None:
    topology = Topology(tp=2, dp=2, pp=2)
    assert topology.groups(["tp"]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups(["dp"]) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups(["pp"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups(["tp", "pp"]) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [topology.coordinate(6, axis) for axis in ("tp", "dp", "pp")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (5, 2, [3, 2]), (10, 4, [2, 3, 3, 2]), (3, 3, [1, 1, 1])],
)
def test_uneven_layers_go_to_the_middle(num_layers: int, num_stages: int, sizes: list[int]) -> None:
    ranges = split_layers(num_layers, num_stages)
    assert [len(layers) for layers in ranges] == sizes
    assert [layer for layers in ranges for layer in layers] == list(range(num_layers))


def test_fewer_layers_than_stages() -> None:
    with pytest.raises(ValueError, match="3 layers cannot fill 4"):
        split_layers(3, 4)
