"""From a config to the parts of the model that stand on one rank."""

import torch

from megatrain.config.schema import ModelConfig
from megatrain.models.decoder import Decoder
from megatrain.models.initial import initialize
from megatrain.parallel.layers import Layers
from megatrain.parallel.topology import split_layers


def build_stages(
    config: ModelConfig, layers: Layers, stages: list[int], num_stages: int, tp: int, seed: int, device: torch.device
) -> list[Decoder]:
    """The given pipeline stages of the model, FP32, with their initial weights."""
    ranges = split_layers(config.num_layers, num_stages)
    built = []
    for stage in stages:
        with torch.device(device):
            part = Decoder(config, layers, ranges[stage], first=stage == 0, last=stage == num_stages - 1)
        initialize(part, config, seed, layers, tp)
        built.append(part)
    return built


def build_model(config: ModelConfig, seed: int, device: torch.device | None = None) -> Decoder:
    """The whole model on one process, in plain PyTorch."""
    return build_stages(config, Layers(), [0], 1, 1, seed, device or torch.device("cpu"))[0]


def build_empty_model(config: ModelConfig) -> Decoder:
    """The same without initial weights, for weights to be loaded into."""
    return Decoder(config, Layers(), range(config.num_layers), first=True, last=True)
