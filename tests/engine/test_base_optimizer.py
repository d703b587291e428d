"""What DeepSpeed's AdamW on the host is told."""

from typing import Any

import pytest
import torch
from torch import nn

from megatrain.engine.zero.base_optimizer import build_base_optimizer
from tests.layouts import ONE_PROCESS, run_config


def test_adamw_on_the_host_gets_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator need not be compiled for that."""
    from megatrain.engine.zero.import_once import import_deepspeed

    import_deepspeed()
    import deepspeed.ops.adam

    given: dict[str, Any] = {}
    monkeypatch.setattr(
        deepspeed.ops.adam, "DeepSpeedCPUAdam", lambda groups, **options: given.update(options, groups=groups)
    )
    options = {"name": "cpu_adamw", "lr": 0.3, "beta1": 0.7, "beta2": 0.8, "eps": 0.25, "weight_decay": 0.125}
    config = run_config("gpt", ONE_PROCESS).model_copy(
        update={"optimizer": run_config("gpt", ONE_PROCESS).optimizer.model_copy(update=options)}
    )
    parameters = [
        ("layers.0.feed_forward.up.weight", nn.Parameter(torch.ones(2, 2))),
        ("final_norm.bias", nn.Parameter(torch.ones(2))),
    ]
    mesh: Any = None  # of one process: nothing is read of it
    build_base_optimizer(parameters, config, mesh)
    groups = given.pop("groups")
    assert given == {"lr": 0.3, "betas": (0.7, 0.8), "eps": 0.25, "adamw_mode": True}
    assert [group["weight_decay"] for group in groups] == [0.125, 0.0]
