"""Pipeline schedules of ``torch.distributed.pipelining`` over this rank's stages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ParallelConfig
from megatrain.config.stages import num_stages, own_stages
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.routing import forget_statistics
from megatrain.parallel.step_input import StepInput


class _Stage(PipelineStage):
    """A stage whose gradients can be collected, and that a schedule can run without a backward pass.

    The schedules that compute weight gradients apart fill ``.grad`` without autograd's accumulation, so no
    hook tells that a gradient is there. Over the bend of a V, torch hands gradients on also in an evaluation.
    """

    collect_gradients: Callable[[], None]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if fwd_chunk_id == 0:  # before its first step torch runs the stage on made-up inputs, to learn the shapes
            forget_statistics(self.submod)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if self.has_backward:
            self.collect_gradients()

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class Pipeline:
    """This rank's part of the pipeline: runs all micro-batches of a step, forward and backward.

    The last stage's module returns the losses of a micro-batch, so what the schedule calls its loss
    function only sums and scales them, by ``loss_factor`` as it is at the time. ``collect_gradients`` is called
    when a micro-batch's weight gradients stand in ``.grad`` that no accumulation hook has seen.
    """

    def __init__(
        self,
        stages: list[nn.Module],
        parallel: ParallelConfig,
        micro_batch_size: int,
        mesh: Mesh,
        collect_gradients: Callable[[], None],
    ):
        self.mesh = mesh
        self.loss_factor: Tensor | float = 1.0
        self._stages, self._parallel, self._micro_batch_size = stages, parallel, micro_batch_size
        self._collect_gradients = collect_gradients
        indices = own_stages(parallel, mesh.coordinate("pp"))
        self.is_first, self.is_last = 0 in indices, num_stages(parallel) - 1 in indices
        self._schedules: dict[tuple[int, int], Any] = {}

    def _schedule(self, batch: StepInput) -> Any:
        """The schedule for batches of this shape; torch's keep the shapes that they saw first."""
        shape = len(batch.tokens), batch.tokens.shape[1]
        if shape not in self._schedules:
            self._schedules[shape] = self._build(len(batch.tokens) // self._micro_batch_size)
        return self._schedules[shape]

    def _build(self, num_micro_batches: int) -> Any:
        parallel, mesh = self._parallel, self.mesh
        pipeline_stages = [
            _Stage(module, index, num_stages(parallel), mesh.device, group=mesh.pp_group)
            for module, index in zip(self._stages, own_stages(parallel, mesh.coordinate("pp")), strict=True)
        ]
        for stage in pipeline_stages:
            stage.collect_gradients = self._collect_gradients
        described = PIPELINE_SCHEDULES[parallel.pp_schedule]
        kind: Any = get_schedule_class(described.torch_name)
        schedule = kind(
            pipeline_stages if issubclass(kind, PipelineScheduleMulti) else pipeline_stages[0],
            n_microbatches=num_micro_batches,
            loss_fn=self._scale,
            scale_grads=False,  # the loss is already divided by the global number of tokens
        )
        if described.in_pairs:
            _split_pairs(schedule)
        return schedule

    def forward_backward(self, batch: StepInput) -> Tensor:
        """Leaves the gradients of the scaled losses of all micro-batches, summed, in ``.grad``.

        Returns: the sequences' unscaled losses [N] on the last stage's rank, zeros on the others.
        """
        return self._run(self._schedule(batch).step, batch)

    @torch.no_grad()
    def forward(self, batch: StepInput) -> Tensor:
        """Does what ``forward_backward`` does, without gradients."""
        return self._run(self._schedule(batch).eval, batch)

    def _run(self, method: Callable[..., Any], batch: StepInput) -> Tensor:
        losses: list[Tensor] = []
        ends: dict[str, Any] = {"target": batch.keys, "losses": losses} if self.is_last else {}
        if batch.positions is not None:
            ends["positions_BT"] = batch.positions
        if batch.lengths is not None:
            ends["lengths_B"] = batch.lengths
        method(
            *([batch.tokens] if self.is_first else []),
            labels_BS=batch.labels,
            keys_B=batch.keys,
            return_outputs=False,
            **ends,
        )
        if not self.is_last:
            return torch.zeros(len(batch.tokens), device=self.mesh.device)
        return torch.cat([loss.unscaled for loss in losses])  # type: ignore[attr-defined]

    def _scale(self, losses_B: Tensor, _: Tensor) -> Tensor:
        scaled = losses_B.sum() * self.loss_factor
        scaled.unscaled = losses_B.detach()  # type: ignore[attr-defined]
        return scaled


def _split_pairs(schedule: Any) -> None:
    """Lets each part of a pair of forward and backward be followed by its own message.

    Torch runs a pair's parts in turn, but sends what the first one computed only after the second.
    """
    schedule.pipeline_order = {
        rank: [part for action in order if action is not None for part in (action.sub_actions or (action,))]
        for rank, order in schedule.pipeline_order.items()
    }
    schedule._prepare_schedule_with_comms(schedule.pipeline_order)
