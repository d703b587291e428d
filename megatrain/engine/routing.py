"""The routers of a mixture over a step: their losses' factor, their statistics over all ranks, their balance biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.parallel.mesh import Mesh
from megatrain.parallel.routing import RouterState
from megatrain.spec.derive import mixture_layers
from megatrain.spec.names import bias_name
from megatrain.spec.schema import ModelSpec


@dataclass(frozen=True)
class RoutingReport:
    """What the routers did in one step. ``totals`` [layers, E + 3] stays on its device: reading it waits."""

    layers: list[int]
    totals: Tensor

    def read(self) -> dict[str, dict[str, Any]]:
        """By layer: ``load`` (each expert's share of the choices), ``entropy`` (mean over the tokens, in nats) and
        ``drop_rate`` (share of the choices that found no room)."""
        found = {}
        for layer, row in zip(self.layers, self.totals.tolist(), strict=True):
            *chosen, dropped, entropy, tokens = row
            choices = max(sum(chosen), 1.0)
            found[f"layers.{layer}"] = {
                "load": [count / choices for count in chosen],
                "entropy": entropy / max(tokens, 1.0),
                "drop_rate": dropped / choices,
            }
        return found


class Routers:
    """All routers of the model; this rank holds the states of its own layers'."""

    def __init__(self, config: ModelSpec, model: nn.Module, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.layers = list(mixture_layers(config))
        self.biases = torch.zeros(len(self.layers), config.experts.num_experts or 0, device=mesh.device)
        """[layers, E] on every rank, as every rank knows all loads; the routers' own are rows of it."""
        named = {name.split(".layers.")[1]: m for name, m in model.named_modules() if isinstance(m, RouterState)}
        self.states = {int(name.split(".")[0]): state for name, state in named.items()}
        self._has_biases = False
        if config.router.balance_rate:
            self._use_biases()

    def _use_biases(self) -> None:
        self._has_biases = True
        for layer, state in self.states.items():
            state.bias_E = self.biases[self.layers.index(layer)]

    def begin_step(self, loss_factor: Tensor) -> None:
        """``loss_factor``: what the sum of token losses is multiplied by before its backward pass."""
        for state in self.states.values():
            state.begin_step(loss_factor)

    def end_step(self, updated: bool) -> RoutingReport | None:
        """Sums the statistics over all ranks and, where the step was not skipped, moves the biases. Collective."""
        if not self.layers:
            return None
        size = (self.config.experts.num_experts or 0) + 3
        totals = torch.zeros(len(self.layers), size, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.coordinate("tp") == 0:  # tensor ranks see the same tokens
            for layer, state in self.states.items():
                totals[self.layers.index(layer)] = state.statistics
        dist.all_reduce(totals)
        if updated and self.config.router.balance_rate:
            chosen = totals[:, :-3]
            direction = (chosen.mean(-1, keepdim=True) - chosen).sign()  # Wang et al. 2024, algorithm 1
            self.biases += self.config.router.balance_rate * direction.to(self.biases.dtype)
        return RoutingReport(self.layers, totals)

    def saved_biases(self) -> dict[str, list[float]]:
        """The balance biases [E] of all layers, for a checkpoint; FP32 numbers survive as JSON. Loaded ones stay, also
        where the rate is zero by now."""
        if not self._has_biases:
            return {}
        return {bias_name(layer): row for layer, row in zip(self.layers, self.biases.tolist(), strict=True)}

    def load_biases(self, saved: Mapping[str, list[float]]) -> None:
        """Goes on with the biases of a checkpoint."""
        own = {layer: saved[bias_name(layer)] for layer in self.layers if bias_name(layer) in saved}
        if own:
            self._use_biases()
        for layer, row in zip(self.layers, self.biases, strict=True):
            if layer in own:
                row.copy_(torch.tensor(own[layer]))
