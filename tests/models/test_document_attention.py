"""The kernels for documents give what the dense mask gives, and no tensor of all pairs."""

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.config.reading.problems import ConfigError
from megatrain.models.build import build_model
from megatrain.models.parts.document_attention import KERNELS
from megatrain.models.parts.documents import documents_of, visible_pairs
from megatrain.train.build import build_engine
from tests.layouts import ONE_PROCESS, run_config


def positions_of(*sequences: list[int]) -> Tensor:
    """Positions [B, S] of sequences of documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in sequences])


def flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, **rest: Any
) -> Tensor:
    """What varlen_attn says that it computes, for machines without a GPU."""
    inspect.signature(REAL_VARLEN).bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **rest)
    assert rest == {"window_size": (-1, 0)}
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    mixed = []
    for begin, end in itertools.pairwise(cu_seq_q.tolist()):
        heads = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        mixed.append(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1))
    return torch.cat(mixed)


REAL_VARLEN = varlen.varlen_attn


def both(kernel: str, positions: Tensor, groups: int) -> tuple[list[Tensor], list[Tensor]]:
    """Mixed values, and, where there are some, gradients: of the kernel and of the dense mask."""
    generator = torch.Generator().manual_seed(positions.numel())
    batch, length = positions.shape
    shapes = ((batch, heads, length, 8) for heads in (4, groups, groups))
    grads = kernel != "flex"  # FlexAttention has no backward on CPUs
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=grads) for shape in shapes]
    weights = torch.randn((batch, 4, length, 8), generator=generator, dtype=torch.float64)
    documents = documents_of(positions, KERNELS[kernel])
    mask = visible_pairs(documents, length, length)
    found = []
    for mixed in (
        KERNELS[kernel].attend(*inputs, documents.plan),
        F.scaled_dot_product_attention(*inputs, mask, enable_gqa=groups < 4),
    ):
        found.append([mixed, *(torch.autograd.grad((mixed * weights).sum(), inputs) if grads else ())])
    return found[0], found[1]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), groups=st.sampled_from([1, 2, 4]))
def test_a_kernel_equals_the_dense_mask(kernel: str, lengths: list[int], groups: int) -> None:
    positions = positions_of(lengths, lengths[::-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", flash_on_cpu)
        ours, dense = both(kernel, positions, groups)
    for mine, reference in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)  # FP64 sums in another order


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_model_gives_the_same_losses_and_gradients(family: str) -> None:
    positions = positions_of([5, 1, 7, 3], [16])
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    results = []
    for kernel in ("dense", "per_document"):
        model = build_model(run_config(family, ONE_PROCESS, model={"attention.documents": kernel}).model, seed=3)
        losses = model(tokens[:, :-1], tokens[:, 1:], positions_BT=positions)
        losses.sum().backward()
        results.append([losses, *(parameter.grad for parameter in model.parameters())])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)  # FP32 sums in another order


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation gave out."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_tensor_is_quadratic_in_the_sequence() -> None:
    """Defect 9: a dense mask of documents is."""
    length, sizes = 2048, {}
    positions = positions_of([64] * (length // 64))
    for kernel in ("dense", "per_document"):
        options = {"attention.documents": kernel, "max_seq_len": length, "num_layers": 1}
        model = build_model(run_config("llama", ONE_PROCESS, model=options).model, seed=3)
        with LargestTensor() as largest:
            model(torch.zeros(1, length, dtype=torch.int64), positions_BT=positions).sum().backward()
        sizes[kernel] = largest.numel
    assert sizes["dense"] >= length**2
    assert sizes["per_document"] <= length * 4 * 64, "nothing but the documents' own pairs, and activations"


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_kernels_of_gpus_are_refused_on_cpus(kernel: str) -> None:
    config = run_config("llama", ONE_PROCESS, model={"attention.documents": kernel})
    with pytest.raises(ConfigError, match=f"attention.documents = {kernel}\\s+trains on GPUs only"):
        build_engine(config, torch.device("cpu"))
