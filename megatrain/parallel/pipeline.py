"""Pipeline schedules of ``torch.distributed.pipelining`` over this rank's stages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from megatrain.config.schema import ParallelConfig
from megatrain.parallel.mesh import Mesh


def own_stages(parallel: ParallelConfig, pp_rank: int) -> list[int]:
    """Stages of a rank: its own number, then every ``pp`` further (interleaved)."""
    return [pp_rank + parallel.pp * i for i in range(parallel.stages_per_rank)]


class StepInput(NamedTuple):
    """One rank's sequences of a step: [N, S] tokens and labels, [N] dropout keys."""

    tokens: Tensor
    labels: Tensor
    keys: Tensor


class Pipeline:
    """This rank's part of the pipeline: runs all micro-batches of a step, forward and backward.

    The last stage's module returns the loss of a micro-batch, so what the schedule calls its loss
    function only scales it, by ``loss_factor`` as it is at the time.
    """

    def __init__(self, stages: list[nn.Module], parallel: ParallelConfig, num_micro_batches: int, mesh: Mesh):
        self.mesh = mesh
        self.loss_factor: float = 1.0
        indices = own_stages(parallel, mesh.coordinate("pp"))
        num_stages = parallel.pp * parallel.stages_per_rank
        pipeline_stages = [
            PipelineStage(module, index, num_stages, mesh.device, group=mesh.pp_group)
            for module, index in zip(stages, indices, strict=True)
        ]
        self.is_first, self.is_last = 0 in indices, num_stages - 1 in indices
        options: dict[str, Any] = {
            "n_microbatches": num_micro_batches,
            "loss_fn": self._scale,
            "scale_grads": False,  # the loss is already divided by the global number of tokens
        }
        self._schedule = (
            Schedule1F1B(pipeline_stages[0], **options)
            if parallel.pp_schedule == "1f1b"
            else ScheduleInterleaved1F1B(list(pipeline_stages), **options)
        )

    def forward_backward(self, batch: StepInput) -> Tensor:
        """Leaves the gradients of the scaled losses of all micro-batches, summed, in ``.grad``.

        Returns: the sum of the unscaled losses on the last pipeline rank, 0 on the others.
        """
        return self._run(self._schedule.step, batch)

    @torch.no_grad()
    def forward(self, batch: StepInput) -> Tensor:
        """As ``forward_backward``, without gradients."""
        return self._run(self._schedule.eval, batch)

    def _run(self, method: Callable[..., Any], batch: StepInput) -> Tensor:
        losses: list[Tensor] = []
        ends = {"target": batch.keys, "losses": losses} if self.is_last else {}
        method(
            *([batch.tokens] if self.is_first else []),
            labels_BS=batch.labels,
            keys_B=batch.keys,
            return_outputs=False,
            **ends,
        )
        return sum((loss.unscaled for loss in losses), torch.zeros((), device=self.mesh.device))  # type: ignore

    def _scale(self, loss: Tensor, _: Tensor) -> Tensor:
        scaled = loss * self.loss_factor
        scaled.unscaled = loss.detach()  # type: ignore[attr-defined]
        return scaled
