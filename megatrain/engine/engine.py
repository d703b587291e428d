"""The training step: micro-batches in, one optimizer update out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ResolvedRun
from megatrain.config.stages import num_stages, rank_of_stage
from megatrain.engine.cpu_bf16 import speed_up_bf16_matmul
from megatrain.engine.errors import LossScaleError
from megatrain.engine.routing import Routers, RoutingReport
from megatrain.engine.zero.gradients import all_reduce_each
from megatrain.engine.zero.start import start_runtime
from megatrain.optim.schedule import learning_rate
from megatrain.parallel.context import build_context
from megatrain.parallel.dropout import dropout_keys, has_dropout
from megatrain.parallel.marks import is_spread, mark
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.step_input import StepInput
from megatrain.spec.labels import IGNORE

if TYPE_CHECKING:
    from megatrain.parallel.pipeline import Pipeline


class RankBatch(Protocol):
    """What the engine reads of a batch: this rank's [N, S] tokens and labels, [N] global sample numbers.

    ``positions`` [N, S]: places of the tokens in their documents, or None where each sequence is one.
    ``lengths`` [N]: tokens before the padding, or None where there is none.
    """

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def sample_ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor | None: ...
    @property
    def lengths(self) -> Tensor | None: ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. ``loss``, ``grad_norm`` and ``losses`` are device tensors: reading them waits.

    ``loss``: mean over the step's loss tokens; ``losses``: sum of each of this rank's sequences [N] (zeros but on
    the last pipeline rank); ``grad_norm``: global norm before clipping; ``tokens``: tokens read by all ranks;
    ``skipped``: the norm is not finite, so there was no update, on any rank; ``routing``: of a mixture of experts.
    """

    loss: Tensor
    losses: Tensor
    grad_norm: Tensor
    lr: float
    tokens: int
    loss_scale: float
    skipped: bool
    routing: RoutingReport | None = None


class RankModel(nn.Module):
    """The parts of the model that stand on this rank (several only when the pipeline interleaves)."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.parts[0](*args, **kwargs)

    def canonical_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(canonical name, parameter): names without the number of the part."""
        return [(name.split(".", 2)[2], parameter) for name, parameter in self.named_parameters()]


class Engine:
    """Trains the parts of a model that stand on this rank.

    One object for every layout: without a pipeline each micro-batch runs forward and backward in
    turn, with one a schedule runs them all; then the runtime reduces the gradients and steps once.
    """

    def __init__(self, config: ResolvedRun, mesh: Mesh, parts: list[nn.Module]):
        self.config, self.mesh = config, mesh
        if mesh.device.type == "cuda":  # what comes from 16 bits is exact in TF32: routers and FP32 logits lose nothing
            torch.set_float32_matmul_precision("highest" if config.precision.dtype == "fp32" else "high")
        else:
            speed_up_bf16_matmul(config.precision.dtype == "bf16")
        self._context = build_context(config.parallel, mesh)
        self.model = RankModel(parts)
        self.parameters = self.model.canonical_parameters()
        self.shapes = {parameter: parameter.shape for _, parameter in self.parameters}
        """Of this rank's parts; ZeRO 3 empties the parameters themselves."""
        self.routers = Routers(config.model, self.model, mesh)
        self._drops = has_dropout(self.model)
        self._mark_tied_copy()
        self.runtime = start_runtime(self.model, self.parameters, config, mesh)
        self.moments = self.runtime.moments
        self._pipeline = self._build_pipeline(parts) if config.parallel.pp > 1 else None

    def _build_pipeline(self, parts: list[nn.Module]) -> "Pipeline":
        # torch's pipelines take most of a second to import: only where there is one
        from megatrain.parallel.pipeline import Pipeline

        config = self.config
        return Pipeline(
            parts,
            config.parallel,
            config.train.micro_batch_size,
            self.mesh,
            self.runtime.collect_gradients,
        )

    def train_step(self, batch: RankBatch, step: int) -> StepResult:
        """Optimizer step number ``step`` (the first is 1) on this rank's sequences of the global batch.

        Raises:
            LossScaleError: on every rank, when an overflow on any skips a step at the smallest loss scale.
        """
        lr = learning_rate(step, self.config.train.steps, self.config.schedule, self.config.optimizer)
        for group in self.runtime.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.model.train()
        scale = self.loss_scale
        losses, num_tokens = self.accumulate(batch)
        self._sum_over_copies()
        updated = self.runtime.step()
        precision = self.config.precision
        if not updated.applied and precision.dtype == "fp16" and scale == precision.min_loss_scale:
            raise LossScaleError(
                f"step {step}: FP16 gradients overflow at the smallest loss scale, precision.min_loss_scale = {scale:g}"
                "; lower optimizer.lr or precision.min_loss_scale, or set precision.dtype to bf16"
            )
        return StepResult(
            loss=self.over_all_ranks(losses.sum()) / num_tokens,
            losses=losses,
            grad_norm=updated.grad_norm,
            lr=lr,
            tokens=batch.tokens.numel() * self.mesh.topology.dp,
            loss_scale=scale,
            skipped=not updated.applied,
            routing=self.routers.end_step(updated=updated.applied),
        )

    def accumulate(self, batch: RankBatch) -> tuple[Tensor, Tensor]:
        """The forward and backward passes of a step: leaves the gradients where the runtime reduces them.

        Returns: the sum of the losses of each of this rank's sequences [N] (zeros but on the last pipeline rank), and
        the number of loss tokens over all ranks, both on the device.
        """
        inputs = self._inputs(batch)
        num_tokens = self._global_loss_tokens(inputs.labels)
        return self._forward_backward(inputs, self._gradient_factor() / num_tokens.double()), num_tokens

    @torch.no_grad()
    def evaluate(self, batch: RankBatch) -> tuple[Tensor, int]:
        """Sum of the losses of a global batch, and its number of loss tokens, both over all ranks."""
        self.model.eval()
        inputs = self._inputs(batch)
        if self._pipeline is not None:
            losses = self._pipeline.forward(inputs)
        else:
            losses = torch.cat([self.runtime.forward(*micro_batch) for micro_batch in self._split(inputs)])
        return self.over_all_ranks(losses.sum()), int(self._global_loss_tokens(inputs.labels))

    def close(self) -> None:
        """Takes what it left out of the process, for one that builds one engine after another."""
        self.runtime.close()

    @property
    def loss_scale(self) -> float:
        """Factor on the loss in FP16, else 1."""
        return self.runtime.loss_scale

    def loss_scaler_state(self) -> dict[str, float]:
        """The dynamic loss scaler's numbers, for a checkpoint; empty but in FP16."""
        return self.runtime.loss_scaler_state()

    def load_loss_scaler_state(self, state: dict[str, float]) -> None:
        """Goes on with the numbers of a checkpoint."""
        self.runtime.load_loss_scaler_state(state)

    def _forward_backward(self, inputs: StepInput, factor: Tensor) -> Tensor:
        """``factor``: what each token's loss is multiplied by, FP64."""
        self.routers.begin_step(factor * self.loss_scale)
        if self._pipeline is not None:
            # the schedule runs the backward passes, so nobody else scales the loss
            self._pipeline.loss_factor = (factor * self.loss_scale).float()
            self.runtime.begin_schedule()
            return self._pipeline.forward_backward(inputs)
        parts, factor = [], factor.float()
        for micro_batch in self._split(inputs):
            losses = self.runtime.forward(*micro_batch)
            self.runtime.backward(losses.sum() * factor)
            parts.append(losses.detach())
        return torch.cat(parts)

    def _gradient_factor(self) -> int:
        """DeepSpeed averages over the data-parallel ranks that share its states; the loss wants a sum."""
        return self.mesh.topology.data_size if self.config.parallel.zero_stage > 0 else 1

    def _sum_over_copies(self) -> None:
        """Sums the two copies of a tied embedding and, without ZeRO, the gradients of all replicas."""
        if self._tied_copies():
            word = [p for name, p in self.parameters if name == "embedding.word.weight"]
            self._all_reduce(word, self.mesh.tied_group)
        if self.config.parallel.zero_stage == 0:
            parameters = [p for _, p in self.parameters]
            self._all_reduce([p for p in parameters if not is_spread(p)], self.mesh.data_group)
            self._all_reduce([p for p in parameters if is_spread(p)], self.mesh.edp_group)

    def _all_reduce(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        gradients = map(self.runtime.accumulated_gradient, parameters)
        all_reduce_each([gradient for gradient in gradients if gradient is not None], group)

    def _tied_copies(self) -> bool:
        """Whether two ranks hold the tied embedding: the ends of a V stand on one, and share it."""
        parallel = self.config.parallel
        v_shaped = PIPELINE_SCHEDULES[parallel.pp_schedule].v_shaped
        return self.config.model.tie_embeddings and parallel.pp > 1 and not v_shaped

    def _mark_tied_copy(self) -> None:
        """Lets the copy of the tied embedding on the last stage count and be saved by the first."""
        if self._tied_copies() and self.mesh.coordinate("pp") > 0:
            for name, parameter in self.parameters:
                if name == "embedding.word.weight":
                    mark(parameter, counted_elsewhere=True, tied_copy=True)

    def _inputs(self, batch: RankBatch) -> StepInput:
        """The batch on this rank's device, cut down to the positions that it holds."""
        tokens, labels = batch.tokens, batch.labels
        if self._context.size > 1:
            own = self._context.positions(tokens.shape[1] // self._context.size)
            tokens, labels = tokens[:, own], labels[:, own]
        tokens, labels, ids = (x.to(self.mesh.device, non_blocking=True) for x in (tokens, labels, batch.sample_ids))
        positions, lengths = (
            None if x is None else x.to(self.mesh.device, non_blocking=True) for x in (batch.positions, batch.lengths)
        )
        keys = dropout_keys(self.config.train.seed, ids) if self._drops else ids
        return StepInput(tokens, labels, keys, positions, lengths)

    def _split(self, inputs: StepInput) -> list[StepInput]:
        return inputs.split(self.config.train.micro_batch_size)

    def _global_loss_tokens(self, labels: Tensor) -> Tensor:
        """Labels of all ranks that count, at least 1; on the device, so that no step waits for it."""
        count = (labels != IGNORE).sum()
        if self.mesh.topology.data_size > 1:
            dist.all_reduce(count, group=self.mesh.data_group)
        return count.clamp_min(1)

    def over_all_ranks(self, losses: Tensor) -> Tensor:
        """Sum over the data-parallel and context ranks of what the last stage holds, on every rank. Collective."""
        losses = losses.detach().clone()
        if self.mesh.topology.data_size > 1:
            dist.all_reduce(losses, group=self.mesh.data_group)
        if self.mesh.topology.pp > 1:
            last = rank_of_stage(self.config.parallel, num_stages(self.config.parallel) - 1)
            dist.broadcast(losses, self.mesh.pipeline_rank(last), group=self.mesh.pp_group)
        return losses
