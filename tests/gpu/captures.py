"""The first step of many configs, on the CPU (also in draws of noise) or on the GPU:

python -m tests.gpu.captures cpu FILE
"""

import os
import pickle
import sys
from typing import Any

from megatrain.config.schema import RunConfig
from tests.layouts import Layout, run_config

MIXTURE: dict[str, Any] = {"experts.num_experts": 8, "experts.hidden_size": 32, "router.z_loss": 0.01}


def configs() -> dict[str, RunConfig]:
    """What is held against the CPU, by name."""

    def made(family: str = "llama", zero_stage: int = 0, **sections: dict[str, Any]) -> RunConfig:
        return run_config(family, Layout(zero_stage=zero_stage), **sections)

    found = {
        "gpt": made("gpt", model={"dropout": 0.1, "attention.dropout": 0.1}),
        "llama": made(),
        "qwen3": made("qwen3"),
        "compiled": made(train={"compile": True}),
        "mixture": made(model=MIXTURE | {"experts.num_shared": 1}),
        "mixture compiled": made(model=MIXTURE | {"experts.num_shared": 1}, train={"compile": True}),
        "mixture with drops": made("gpt", model=MIXTURE | {"experts.capacity": 0.75}, train={"compile": True}),
    }
    for stage in (1, 2, 3):
        found[f"ZeRO {stage}"] = made(zero_stage=stage)
    for optimizer in ("lion", "adafactor", "muon"):
        found[optimizer] = made(zero_stage=1, optimizer={"name": optimizer})
    found["bf16"] = made(precision={"dtype": "bf16"})
    found["fp16"] = made(precision={"dtype": "fp16", "initial_loss_scale": 1024.0})
    return found


def capture_all(device_type: str) -> dict[str, Any]:
    """By name what a step of each config came to, on the CPU followed by its draws of noise."""
    import torch

    from megatrain.engine.start import start_distributed
    from megatrain.parity.capture import capture_steps
    from megatrain.parity.run import DRAWS

    device = start_distributed()
    assert device.type == device_type
    captured, draws = {}, DRAWS if device_type == "cpu" else 0
    for name, config in configs().items():
        captured[name] = [capture_steps(config, device, draw=draw, steps=1) for draw in range(1 + draws)]
        torch._dynamo.reset()
    return captured


if __name__ == "__main__":
    if sys.argv[1] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked yet
    with open(sys.argv[2], "wb") as file:
        pickle.dump(capture_all(sys.argv[1]), file)
