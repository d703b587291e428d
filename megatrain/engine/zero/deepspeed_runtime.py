"""DeepSpeed's engine as the engine here sees it: what its optimizers for ZeRO have in common."""

from typing import Any

import torch
from torch import Tensor, nn

from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.engine.zero.leftovers import clear_leftovers
from megatrain.engine.zero.loss_scaler import LossScaler
from megatrain.engine.zero.runtime import Moments, Runtime, Updated
from megatrain.parallel.mesh import Mesh
from megatrain.spec.kinds import WEIGHT


class DeepSpeedRuntime(Runtime):
    """One subclass for each class of DeepSpeed's optimizers, which keep gradients and state in places of their own.

    ``optimizer``: DeepSpeed's, around torch's.
    """

    def __init__(self, deepspeed: Any, mesh: Mesh, moments: Moments):
        super().__init__(deepspeed.basic_optimizer, moments)
        self.deepspeed, self.optimizer, self.mesh = deepspeed, deepspeed.optimizer, mesh
        self._loss_scaler: LossScaler | None = None

    def scale_loss(self) -> None:
        """Lets the losses of FP16 be scaled; by the optimizers that can."""
        self._loss_scaler = LossScaler(self.optimizer.loss_scaler)

    @property
    def clip_norm(self) -> float:
        return self.optimizer.clip_grad

    @clip_norm.setter
    def clip_norm(self, norm: float) -> None:
        self.optimizer.clip_grad = norm

    def forward(self, *inputs: Any) -> Tensor:
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> Updated:
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        if applied and self._loss_scaler is not None:
            self._loss_scaler.count_good_step()
        return Updated(applied, torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32))

    @property
    def loss_scale(self) -> float:
        return 1.0 if self._loss_scaler is None else float(self.optimizer.loss_scale)

    def loss_scaler_state(self) -> dict[str, float]:
        return {} if self._loss_scaler is None else self._loss_scaler.state()

    def load_loss_scaler_state(self, state: dict[str, float]) -> None:
        if self._loss_scaler is not None:
            self._loss_scaler.load_state(state)

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        utils = import_deepspeed().utils
        if kind == WEIGHT:
            return utils.safe_get_full_fp32_param(parameter)
        return utils.safe_get_full_optimizer_state(parameter, kind)

    def close(self) -> None:
        self.deepspeed.destroy()
        clear_leftovers()
