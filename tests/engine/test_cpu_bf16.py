"""The BF16 product through FP32 is the product of the same numbers, rounded once, and stands where BF16 is trained."""

from tests.pool import Pool


def multiply() -> None:
    """The other side is numpy: every product of torch's goes through what is tested."""
    import numpy as np
    import torch

    from megatrain.engine import cpu_bf16

    torch.backends.cpu.get_cpu_capability = lambda: "AVX2"
    cpu_bf16.speed_up_bf16_matmul(True)
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


def products_through_python() -> list[bool]:
    """Whether torch's product is replaced once engines of these types were built, one after another."""
    import torch

    from tests.layouts import ONE_PROCESS, build_engine, run_config

    torch.backends.cpu.get_cpu_capability = lambda: "AVX2"
    found = []
    for dtype in ("fp32", "bf16", "bf16", "fp32"):
        engine = build_engine(run_config("gpt", ONE_PROCESS, precision={"dtype": dtype}))
        kernel = torch._C._dispatch_dump("aten::mm").partition("\nCPU: ")[2].partition("\n")[0]
        found.append("cpu_bf16.py" in kernel)
        engine.close()
    return found


def test_product_through_fp32() -> None:
    worker = Pool(1)  # of its own: the product is replaced in the whole process
    try:
        worker.run(multiply, 1)
        assert worker.run(products_through_python, 1)[0] == [False, True, True, False]
    finally:
        worker.close()
