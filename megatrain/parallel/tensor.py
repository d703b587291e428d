"""The same layers with their matrices split over the tensor axis, by megatron-core.

megatron-core asks CUDA for the current device also where there is none, and keeps its groups in
module globals; both are met here and nowhere else. Shoeybi et al. 2019 (tensor parallelism),
Korthikanti et al. 2022 (sequence parallelism).
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it tells everybody without Transformer Engine and Apex that they are missing
    from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

from megatrain.parallel.column import column_linears
from megatrain.parallel.context import WholeSequence
from megatrain.parallel.dropout import AttentionDropout, Dropout
from megatrain.parallel.layers import Layers
from megatrain.parallel.marks import Split, mark
from megatrain.parallel.mesh import Mesh


class _OutputOnly:
    """megatron-core's linears return (output, bias); a textbook linear returns its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]  # type: ignore[misc]


class ColumnLinear(_OutputOnly, tensor_parallel.ColumnParallelLinear):
    """Rows of the weight are split: each rank computes a part of the outputs."""


class RowLinear(_OutputOnly, tensor_parallel.RowParallelLinear):
    """Columns of the weight are split: each rank computes a summand of all outputs."""


class TensorParallelLayers(Layers):
    """Factory of layers split over ``mesh.tp_group``."""

    def __init__(
        self, mesh: Mesh, sequence_parallel: bool, context: WholeSequence, expert_group: dist.ProcessGroup | None
    ):
        super().__init__(context, expert_group)
        _announce_groups(mesh)
        self.group = mesh.tp_group
        self.splits["tp"] = Split.over(mesh.tp_group)
        self.rank, self.size = self.splits["tp"]
        self.sequence_parallel = sequence_parallel
        config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,  # allocate on torch's default device, which the caller sets
            perform_initialization=False,  # weights are a function of their names: models/initial.py
        )
        self._options: dict[str, Any] = {"config": config, "init_method": None, "tp_group": self.group}

    def column_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        linear = ColumnLinear(in_features, out_features, bias=bias, **self._options)
        return _split(linear, weight=0, bias=0)

    @torch.compiler.disable  # a trace reads ZeRO-3's weights without fetching them
    def column_outputs(self, linears: Sequence[nn.Module], x_SBD: Tensor) -> list[Tensor]:
        weights: list[Tensor] = [linear.weight for linear in linears]  # type: ignore[misc]
        return column_linears(x_SBD, weights, self.group, self.sequence_parallel)

    def row_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        linear = RowLinear(
            in_features, out_features, bias=bias, input_is_parallel=True, skip_bias_add=False, **self._options
        )
        if bias and self.sequence_parallel:  # it is added to the summed, so sequence-split, outputs
            self._sum_gradient(linear.bias)
        return _split(linear, weight=1)

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Module:
        return _split(tensor_parallel.VocabParallelEmbedding(vocab_size, width, **self._options), weight=0)

    def embed(self, table: nn.Module, tokens_BS: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return super().embed(table, tokens_BS)
        table.reduce_scatter_embeddings = True  # type: ignore[assignment]  # sums and splits at once
        return table(tokens_BS)

    def head_logits(self, x_SBD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_with_grad_accumulation_and_async_allreduce(
            x_SBD,
            weight_VD,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.group,
        )

    def vocab_start(self, width: int) -> int:
        return self.rank * width

    def cross_entropy(self, logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
        # FP32 logits are overwritten; nobody else reads them
        return tensor_parallel.vocab_parallel_cross_entropy(logits_SBV, labels_SB.contiguous())

    def on_split_sequence(self, module: nn.Module) -> nn.Module:
        if self.sequence_parallel:
            for parameter in module.parameters():
                self._sum_gradient(parameter)
        return module

    def in_split_region(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            self._sum_gradient(parameter)
        return module

    def split_sequence(self, x_SBD: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return x_SBD
        return tensor_parallel.scatter_to_sequence_parallel_region(x_SBD, group=self.group)

    def gathered_length(self, num_rows: int) -> int:
        return num_rows * self.size if self.sequence_parallel else num_rows

    def dropout(self, probability: float, site: str) -> nn.Module:
        return Dropout(probability, site, self._split_positions if self.sequence_parallel else self.positions)

    def attention_dropout(self, probability: float, site: str) -> nn.Module:
        return AttentionDropout(probability, site, self.context.head_part(self.rank))

    def enter_experts(self, x_SBD: Tensor) -> Tensor:
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x_SBD, group=self.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(x_SBD, group=self.group)

    def leave_experts(self, y_SBD: Tensor) -> Tensor:
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(y_SBD, group=self.group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(y_SBD, group=self.group)

    def _split_positions(self, num_local: int, device: torch.device) -> Tensor:
        return self.positions(self.gathered_length(num_local), device).chunk(self.size)[self.rank]

    def _sum_gradient(self, parameter: nn.Parameter) -> None:
        """A parameter that saw only this rank's part of the sequence, of the heads or of the
        experts has a part of its gradient.

        Summed as it arises, before any optimizer's hook can take it away.
        """
        parameter.register_hook(self._all_reduce)

    def _all_reduce(self, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=self.group)
        return gradient


def _split(module: nn.Module, **dims: int) -> nn.Module:
    """Marks the parameters of ``module`` that are split, by name with the dim that is."""
    for name, dim in dims.items():
        if (parameter := getattr(module, name)) is not None:
            mark(parameter, tensor_dim=dim)
    return module


def _announce_groups(mesh: Mesh) -> None:
    """Tells megatron-core which ranks share a tensor: its cross-entropy reads module globals."""
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = mesh.tp_group
    parallel_state.set_tensor_model_parallel_world_size(dist.get_world_size(mesh.tp_group))
    parallel_state.set_tensor_model_parallel_rank(dist.get_rank(mesh.tp_group))
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def forget_groups() -> None:
    """Resets megatron-core's globals, for a process that builds one layout after another."""
    parallel_state.destroy_model_parallel()
