"""Every part that a config can name has its cases."""

import importlib
from pathlib import Path

import pytest

from megatrain.models.parts.feed_forward import FEED_FORWARDS
from megatrain.models.parts.mixers import MIXERS
from megatrain.models.parts.norm import NORMS
from tests.models.parts.mixer_suite import MixerSuite
from tests.models.parts.suite import FeedForwardSuite, NormSuite, PartSuite


def named_by(suite: type[PartSuite]) -> set[type]:
    """The parts that the test classes below a suite name."""
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"{__package__}.{path.stem}")
    own = {suite.part} if "part" in vars(suite) and suite.__name__.startswith("Test") else set()
    return own.union(*(named_by(below) for below in suite.__subclasses__()))


@pytest.mark.parametrize(
    ("table", "suite"), [(MIXERS, MixerSuite), (FEED_FORWARDS, FeedForwardSuite), (NORMS, NormSuite)]
)
def test_every_named_part_has_a_suite(table: dict[str, type], suite: type[PartSuite]) -> None:
    assert named_by(suite) == set(table.values())
