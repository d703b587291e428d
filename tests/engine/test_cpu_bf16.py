"""The BF16 product through FP32 is the product of the same numbers, rounded once."""

from tests.pool import Pool


def multiply() -> None:
    """The other side is numpy: every product of torch's goes through what is tested."""
    import numpy as np
    import torch

    from megatrain.engine import cpu_bf16

    torch.backends.cpu.get_cpu_capability = lambda: "AVX2"
    cpu_bf16.speed_up_bf16_matmul()
    torch.manual_seed(0)
    a, w = torch.randn(6, 7, 16).bfloat16().requires_grad_(), torch.randn(5, 16).bfloat16().requires_grad_()
    y = torch.nn.functional.linear(a, w)
    assert y.dtype == torch.bfloat16
    exact = torch.from_numpy(a.detach().double().numpy() @ w.detach().double().numpy().T)
    assert (y - exact).abs().max() <= 2**-8 * exact.abs().max(), "half a unit of a number of 8 bits"
    y.sum().backward()
    assert (a.grad.double() - w.detach().double().sum(0)).abs().max() < 2**-7 * 16  # type: ignore[union-attr]
    for shape in ((3, 4), (2, 3, 4)):
        x = torch.randn(shape)
        np.testing.assert_allclose(x @ x.mT, x.double().numpy() @ x.double().mT.numpy(), rtol=1e-5, atol=1e-6)


def test_product_through_fp32() -> None:
    worker = Pool(1)  # of its own: the product is replaced in the whole process
    try:
        worker.run(multiply, 1)
    finally:
        worker.close()
