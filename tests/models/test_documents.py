"""Attention never crosses a document: a packed sequence gives what its documents give one by one."""

import pytest
import torch

from megatrain.models.build import build_model
from tests.layouts import ONE_PROCESS, run_config

LENGTHS = [5, 1, 7, 3]  # a sequence of 16 tokens


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["fused", "dense"])  # 1e-9: no element falls out
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_packed_sequence_equals_its_documents_alone(family: str, dropout: float) -> None:
    model = build_model(run_config(family, ONE_PROCESS, model={"attention.dropout": dropout}).model, seed=3)
    with torch.no_grad():  # positions that matter
        for parameter in model.parameters():
            parameter.mul_(4)
    documents = [torch.randint(0, 64, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    keys = torch.zeros(1, dtype=torch.int64)
    logits = model(packed, keys_B=keys, positions_BT=positions)
    alone = torch.cat([model(document, keys_B=keys) for document in documents])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)  # FP32 sums in another order
    assert not torch.allclose(model(packed, keys_B=keys), alone, rtol=1e-2), "without positions, documents mix"


def test_a_sequence_of_one_document_needs_no_positions() -> None:
    model = build_model(run_config("llama", ONE_PROCESS).model, seed=3)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with_positions = model(tokens, positions_BT=torch.arange(16).expand(2, 16))
    torch.testing.assert_close(with_positions, model(tokens), rtol=1e-5, atol=1e-6)
