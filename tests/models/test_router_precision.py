"""Routers of a BF16 model compute in FP32: BF16 logits would choose other experts."""

import torch
from torch import nn

from megatrain.models.parts.mixture import Router
from megatrain.parallel.layers import Layers
from tests.configs import model_spec


def test_a_router_of_16_bit_weights_has_fp32_logits() -> None:
    config = model_spec({"hidden_size": 64, "attention.num_heads": 4, "experts.num_experts": 8})
    router = Router(config, Layers())
    generator = torch.Generator().manual_seed(0)
    router.weight = nn.Parameter(torch.randn(8, 64, generator=generator).bfloat16())
    tokens = torch.randn(5, 2, 64, generator=generator).bfloat16()
    experts, gates = router(tokens)
    logits = tokens.double() @ router.weight.double().T
    assert torch.equal(experts, logits.topk(2).indices)
    # normalised over the chosen: their softmax; FP32 rounds a sum of 64 products by about 1e-6
    torch.testing.assert_close(gates.double(), logits.gather(-1, experts).softmax(-1), rtol=1e-5, atol=1e-6)
