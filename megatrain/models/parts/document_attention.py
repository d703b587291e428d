"""Attention inside the documents of packed sequences, without a mask of all pairs of positions.

The work of these kernels grows with the documents' lengths, not with the square of the sequence's. Each takes whole
sequences, and a plan, made once for all layers. Shapes: B micro-batch, S sequence, H query heads, G key/value heads,
K head width, N = B x S tokens, D documents in them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention, varlen


@dataclass(frozen=True)
class DocumentKernel:
    """``plan``: positions [B, S] in their documents -> what ``attend`` needs to know of them.

    ``attend``: queries [B, H, S, K], keys and values [B, G, S, K] and the plan -> mixed values [B, H, S, K].
    """

    plan: Callable[[Tensor], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def document_lengths(positions_BS: Tensor) -> list[int]:
    """Tokens of each document; every sequence begins one."""
    begins = torch.nonzero(positions_BS.flatten() == 0).flatten()
    return torch.diff(begins, append=begins.new_tensor([positions_BS.numel()])).tolist()


def attend_per_document(query_BHSK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention of one document after the other."""
    runs = (_tokens(x).transpose(0, 1).split(lengths, dim=1) for x in (query_BHSK, key_BGSK, value_BGSK))
    gqa = query_BHSK.shape[1] > key_BGSK.shape[1]
    mixed = [
        F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, enable_gqa=gqa)[0]
        for query, key, value in zip(*runs, strict=True)
    ]
    return _sequences(torch.cat(mixed, dim=1).transpose(0, 1), query_BHSK)


def visible_tiles(positions_BS: Tensor) -> flex_attention.BlockMask:
    """Which tiles of the pairs hold one that is seen."""
    numbers = (positions_BS == 0).cumsum(1)

    def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (numbers[b, query] == numbers[b, key])

    batch, length = positions_BS.shape
    return flex_attention.create_block_mask(sees, batch, None, length, length, device=positions_BS.device)


def attend_flex(query_BHSK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, tiles: flex_attention.BlockMask) -> Tensor:
    """FlexAttention (Dong et al. 2024), compiled on GPUs; on CPUs it gives no gradients."""
    kernel: Any = _compiled_flex() if query_BHSK.is_cuda else flex_attention.flex_attention
    gqa = query_BHSK.shape[1] > key_BGSK.shape[1]
    mixed: Tensor = kernel(query_BHSK, key_BGSK, value_BGSK, block_mask=tiles, enable_gqa=gqa)
    return mixed


def document_bounds(positions_BS: Tensor) -> tuple[Tensor, int]:
    """``cu_seqlens`` int32 [D + 1] on the device, and the longest document's tokens."""
    lengths = document_lengths(positions_BS)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(positions_BS.device, torch.int32), max(lengths)


def attend_varlen(query_BHSK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, bounds: tuple[Tensor, int]) -> Tensor:
    """The kernel for sequences of different lengths of FlashAttention 2 (Dao 2023): GPUs, 16 bits."""
    cu_seqlens, longest = bounds
    copies = query_BHSK.shape[1] // key_BGSK.shape[1]
    query, key, value = _tokens(query_BHSK), *(_tokens(x).repeat_interleave(copies, 1) for x in (key_BGSK, value_BGSK))
    causal = (-1, 0)  # everything to the left, nothing to the right
    mixed = varlen.varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, window_size=causal)
    assert isinstance(mixed, Tensor)
    return _sequences(mixed, query_BHSK)


KERNELS = {
    "per_document": DocumentKernel(document_lengths, attend_per_document),
    "flex": DocumentKernel(visible_tiles, attend_flex),
    "varlen": DocumentKernel(document_bounds, attend_varlen),
}
"""By their names in ``model.attention.documents``; "dense" has none."""


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention.flex_attention)


def _tokens(x_BHSK: Tensor) -> Tensor:
    """[N, H, K]: the sequences one after the other."""
    return x_BHSK.transpose(1, 2).flatten(0, 1)


def _sequences(x_NHK: Tensor, like_BHSK: Tensor) -> Tensor:
    """[B, H, S, K]: the sequences side by side again."""
    return x_NHK.unflatten(0, (like_BHSK.shape[0], like_BHSK.shape[2])).transpose(1, 2)
