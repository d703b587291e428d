"""The layers that a model is made of, as plain PyTorch: one rank holds every matrix whole.

``Layers`` is what models are given to build themselves with. Its sibling in ``tensor`` has the
same methods and splits the matrices over ranks; a model cannot tell which one it got.
Shapes: S sequence, B micro-batch, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.parallel.context import WholeSequence
from megatrain.parallel.dropout import AttentionDropout, Dropout
from megatrain.parallel.experts import ExpertExchange, ExpertParallelExchange
from megatrain.parallel.marks import Split, mark, place, split_dims
from megatrain.parallel.routing import RouterState


class Layers:
    """Factory of a model's layers, all matrices whole.

    ``context``: which positions of the sequences are here; ``expert_group``: ranks that share the experts of a
    mixture, None where all experts are here; ``splits``: this rank's part of what each axis splits.
    """

    def __init__(self, context: WholeSequence | None = None, expert_group: dist.ProcessGroup | None = None):
        self.context = context or WholeSequence()
        self.expert_group = expert_group
        self.splits = {"tp": Split(), "ep": Split.over(expert_group)}

    def column_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Linear whose outputs are independent of each other (may be split over ranks)."""
        return nn.Linear(in_features, out_features, bias)

    def column_outputs(self, linears: Sequence[nn.Module], x_SBD: Tensor) -> list[Tensor]:
        """Outputs of several column linears without bias on one input."""
        return [linear(x_SBD) for linear in linears]

    def row_linear(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Linear that takes what a column linear gave out, and returns whole outputs."""
        return nn.Linear(in_features, out_features, bias)

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Module:
        """Embedding table [V, D]: tokens [...] -> [..., D]."""
        return nn.Embedding(vocab_size, width)

    def vocab_bias(self, vocab_size: int) -> nn.Parameter:
        """A number for each token [V], split as the rows of an embedding table are."""
        tensor = self.splits["tp"]
        parameter = nn.Parameter(torch.empty(vocab_size // tensor.size))
        mark(parameter, tensor_dim=0 if tensor.size > 1 else None)
        return parameter

    def embed(self, table: nn.Module, tokens_BS: Tensor) -> Tensor:
        """Rows [S, B, D] of an embedding table, in the region where activations may be split over the sequence."""
        return table(tokens_BS).transpose(0, 1).contiguous()

    def head_logits(self, x_SBD: Tensor, weight_VD: Tensor) -> Tensor:
        """Logits [S, B, V] (V: the part of the vocabulary that ``weight_VD`` holds)."""
        return F.linear(x_SBD, weight_VD)

    def vocab_start(self, width: int) -> int:
        """First token of this rank's part of a vocabulary that is split into parts of ``width``."""
        return 0

    def hide_tokens_from(self, first: int, logits_SBV: Tensor) -> Tensor:
        """Takes the tokens from number ``first`` on out of the softmax."""
        width = logits_SBV.shape[-1]
        tokens_V = torch.arange(width, device=logits_SBV.device) + self.vocab_start(width)
        return logits_SBV.masked_fill(tokens_V >= first, -torch.inf)

    def cross_entropy(self, logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
        """Loss of each token [S, B], FP32. Labels must lie in the vocabulary."""
        loss = F.cross_entropy(logits_SBV.float().flatten(0, 1), labels_SB.flatten(), reduction="none")
        return loss.view_as(labels_SB)

    def positions(self, num_local: int, device: torch.device | None = None) -> Tensor:
        """Positions in the sequence [``num_local``] of the tokens that are here."""
        return self.context.positions(num_local, device)

    def gathered_length(self, num_rows: int) -> int:
        """Positions that attention sees here, of activations split over the sequence to ``num_rows``."""
        return num_rows

    def sequence_length(self, num_local: int) -> int:
        """Tokens of the sequences of which ``num_local`` are here."""
        return num_local * self.context.size

    def attention(self, core: nn.Module) -> nn.Module:
        """Lets the queries that are here attend by ``core`` to all keys of their sequence, wherever they are."""
        return self.context.attention(core)

    def on_split_sequence(self, module: nn.Module) -> nn.Module:
        """Declares that ``module`` works on activations that may be split over the sequence."""
        return module

    def in_split_region(self, module: nn.Module) -> nn.Module:
        """Declares that ``module``, which every rank holds whole, works on heads or for experts that may be split."""
        return module

    def split_sequence(self, x_SBD: Tensor) -> Tensor:
        """Enters the region where activations may be split over the sequence."""
        return x_SBD

    def dropout(self, probability: float, site: str) -> nn.Module:
        """Dropout of [S, B, D] activations; ``site`` is its place in the model, like a canonical name."""
        return Dropout(probability, site, self.positions)

    def attention_dropout(self, probability: float, site: str) -> nn.Module:
        """Dropout of attention probabilities [B, H, S, T]: the last S of T positions attend to all T."""
        return AttentionDropout(probability, site, self.context.head_part(0))

    def whole_sequence(self, x_S: Tensor) -> Tensor:
        """[S, ...] of all positions of the sequences, in order, without a gradient."""
        return self.context.in_order(x_S)

    def sum_over_sequence(self, x: Tensor) -> Tensor:
        """Sum over the ranks that share the sequences, without a gradient."""
        return self.context.total(x)

    def expert_matrices(self, num_experts: int, rows: int, columns: int, split: int) -> nn.Parameter:
        """Matrices [E, rows, columns] of the experts that are here; dim ``split`` may be split over tensor ranks."""
        expert, tensor = self.splits["ep"], self.splits["tp"]
        shape = [num_experts // expert.size, rows, columns]
        shape[split] //= tensor.size
        parameter = nn.Parameter(torch.empty(shape))
        mark(parameter, spread=expert.size > 1, tensor_dim=split if tensor.size > 1 else None)
        return parameter

    def expert_exchange(self, num_experts: int, drops: bool) -> ExpertExchange:
        """Brings tokens to their experts and back. ``drops``: some tokens may not be sent."""
        if self.expert_group is None:
            return ExpertExchange(num_experts, drops)
        return ExpertParallelExchange(num_experts, drops, self.expert_group)

    def router_state(self, num_experts: int) -> RouterState:
        """What a router keeps beside its weight."""
        return RouterState(num_experts, gradient_share=1.0 / self.splits["tp"].size)

    def enter_experts(self, x_SBD: Tensor) -> Tensor:
        """Enters the region where every rank has all positions and a part of each expert, so of each gradient."""
        return x_SBD

    def leave_experts(self, y_SBD: Tensor) -> Tensor:
        """Sums the parts that the experts of all ranks computed."""
        return y_SBD

    def local_part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """The part of a whole tensor that this rank's ``parameter`` holds."""
        for axis, dim in split_dims(parameter).items():
            whole = whole.chunk(self.splits[axis].size, dim)[self.splits[axis].rank]
        return whole

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of a parameter as one rank would hold it."""
        return place(parameter, parameter.shape, self.splits)[1]
