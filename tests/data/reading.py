"""Runs that read small data sets."""

from pathlib import Path
from typing import Any

from megatrain.config.schema import RunConfig
from megatrain.data.feed.training import TrainingData
from tests.configs import run_config_of
from tests.data.factory import make_dataset

SEQ = 16
SIZES = {"a": 3000, "b": 1700, "c": 900}  # tokens


def make_sources(folder: Path, names: str = "abc") -> dict[str, dict[str, Any]]:
    """``data.train`` of several data sets made below ``folder``."""
    return {
        name: {"path": str(make_dataset(folder / name, SIZES[name], seed=number)), "weight": weight}
        for number, (name, weight) in enumerate(zip("abc", ("1", "1/2", "0.3"), strict=True))
        if name in names
    }


def run_config(sources: Any, train: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    return run_config_of(
        {
            "model": {"vocab_size": 300},
            "data": {"train": sources, "seq_len": SEQ, "seed": 5, **data},
            "train": {"steps": 50, "global_batch_size": 24, **(train or {})},
        }
    )


def training_data(sources: Any, train: dict[str, Any] | None = None, **data: Any) -> TrainingData:
    return TrainingData(run_config(sources, train, **data), 300)
