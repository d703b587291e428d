"""From a config to the parts of the model that stand on one rank."""

import torch

from megatrain.config.schema import PrecisionConfig
from megatrain.models.decoder import Decoder
from megatrain.models.initial import initialize
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


def build_stages(
    config: ModelSpec,
    layers: Layers,
    stages: list[int],
    blocks: list[range],
    seed: int,
    device: torch.device,
    precision: PrecisionConfig,
) -> list[Decoder]:
    """The given pipeline stages of the model, FP32, with their initial weights.

    Args:
        blocks: the blocks of every stage of the model.
    """
    built: list[Decoder] = []
    for stage in stages:
        with torch.device(device):
            part = Decoder(
                config, layers, blocks[stage], first=stage == 0, last=stage == len(blocks) - 1, precision=precision
            )
        initialize(part, config, seed, layers)
        built.append(part)
    if config.tie_embeddings and len(built) > 1 and built[0].first and built[-1].last:
        built[-1].embedding.word = built[0].embedding.word  # both ends of the model are here: one table
    return built


def build_model(config: ModelSpec, seed: int, device: torch.device | None = None) -> Decoder:
    """The whole model on one process, in plain PyTorch."""
    blocks, cpu = [range(config.num_layers)], torch.device("cpu")
    return build_stages(config, Layers(), [0], blocks, seed, device or cpu, PrecisionConfig())[0]


def build_empty_model(config: ModelSpec) -> Decoder:
    """The same without initial weights, for weights to be loaded into."""
    return Decoder(config, Layers(), range(config.num_layers), first=True, last=True)
