"""Norms by their formulas, with an epsilon that counts, on a stream wider than their weights."""

import torch

from megatrain.models.parts.norm import LayerNorm, RMSNorm


def test_norms_are_their_formulas() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for norm in (LayerNorm(6, eps=0.5), RMSNorm(6, eps=0.5)):
        with torch.no_grad():
            for number, parameter in enumerate(norm.parameters()):
                parameter.copy_(torch.arange(6.0) + number)
        centred = x - x.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else x
        expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
        if isinstance(norm, LayerNorm):
            expected = expected + norm.bias
        torch.testing.assert_close(norm(x), expected)
        wide = norm.bfloat16()(x)
        assert wide.dtype == torch.bfloat16, "its weights' type"
        torch.testing.assert_close(wide.float(), expected, rtol=2**-8, atol=1e-6)  # rounded once
