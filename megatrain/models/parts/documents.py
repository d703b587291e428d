"""Sequences that hold several documents: which tokens see each other, and where each stands in its own document.

Shapes: S positions that this rank holds, T all positions of the sequence, B micro-batch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatrain.models.parts.document_attention import DocumentKernel


class Documents(NamedTuple):
    """``positions_BT``: places of the tokens in their documents, from 0; ``numbers_BT``: of the documents, from 1; 0 of
    padding that is told apart.

    ``plan``: what the model's kernel knows of them; None: it takes the dense mask of ``visible_pairs``.
    """

    positions_BT: Tensor
    numbers_BT: Tensor
    plan: Any


def documents_of(positions_BT: Tensor, kernel: DocumentKernel | None) -> Documents:
    """A token of position 0 begins a document."""
    return Documents(positions_BT, (positions_BT == 0).cumsum(1), kernel.plan(positions_BT) if kernel else None)


def own_positions(own_S: Tensor, documents: Documents | None) -> Tensor:
    """Positions [S, B or 1] for the model, of the tokens at the places ``own_S`` of the sequence."""
    return own_S[:, None] if documents is None else documents.positions_BT[:, own_S].transpose(0, 1)


def with_padding(documents: Documents | None, lengths_B: Tensor, num_positions: int) -> Documents:
    """The same, told that sequences are padding from their places ``lengths_B`` on. Who sees ahead must know."""
    places_T = torch.arange(num_positions, device=lengths_B.device)
    if documents is None:
        positions_BT = places_T.expand(len(lengths_B), -1)
        documents = Documents(positions_BT, torch.ones_like(positions_BT), None)
    is_padding_BT = places_T >= lengths_B[:, None]
    return documents._replace(numbers_BT=documents.numbers_BT.masked_fill(is_padding_BT, 0))


def between(documents: Documents, begin: int, end: int) -> Documents:
    """What is told of the positions from ``begin`` to before ``end``, for the dense mask."""
    return Documents(documents.positions_BT[:, begin:end], documents.numbers_BT[:, begin:end], None)


def same_document(documents: Documents, rows: int, cols: int) -> Tensor:
    """[B, rows, cols]: whether the last ``rows`` of the first ``cols`` positions share a document with each of them."""
    numbers = documents.numbers_BT[:, :cols]
    return numbers[:, cols - rows :, None] == numbers[:, None, :]


def visible_pairs(documents: Documents, rows: int, cols: int) -> Tensor:
    """[B, 1, rows, cols]: whether a query, of the last ``rows`` of the first ``cols`` positions, sees a key.

    Attention is causal inside a document and never crosses it.
    """
    return same_document(documents, rows, cols).tril(cols - rows).unsqueeze(1)
