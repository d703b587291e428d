"""What building an engine refuses."""

import pytest
import torch
from torch.torch_version import TorchVersion

from megatrain.config.reading.problems import ConfigError
from tests.layouts import Layout, build_engine, run_config


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv", "dualpipev"])
def test_schedules_that_split_the_backward_pass_are_refused_by_an_older_torch(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    with pytest.raises(ConfigError, match=f"pp_schedule = {schedule}\\s+needs torch 2.12 or newer.*is 2.11.0"):
        build_engine(run_config("llama", Layout(pp=2, schedule=schedule)))
