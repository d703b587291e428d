"""The BF16 product through FP32 is the product of the same numbers, rounded once."""

from tests.pool import Pool


def multiply() -> None:
    import torch

    from megatrain.engine import cpu_bf16

    torch.backends.cpu.get_cpu_capability = lambda: "AVX2"
    cpu_bf16.speed_up_bf16_matmul()
    torch.manual_seed(0)
    a, w = torch.randn(6, 7, 16).bfloat16().requires_grad_(), torch.randn(5, 16).bfloat16().requires_grad_()
    y = torch.nn.functional.linear(a, w)
    assert y.dtype == torch.bfloat16
    exact = torch.einsum("sbk,nk->sbn", a.detach().double(), w.detach().double())
    assert torch.equal(y, exact.to(torch.bfloat16)) or (y - exact).abs().max() < 2**-8 * exact.abs().max()
    y.sum().backward()
    assert (a.grad.double() - w.detach().double().sum(0)).abs().max() < 2**-7 * 16  # type: ignore[union-attr]
    x = torch.randn(3, 4)
    assert torch.allclose(x @ x.T, (x.double() @ x.double().T).float(), atol=1e-6)
    b = torch.randn(2, 3, 4)
    assert torch.allclose(b @ b.mT, (b.double() @ b.double().mT).float(), atol=1e-6)


def test_product_through_fp32() -> None:
    worker = Pool(1)  # of its own: the product is replaced in the whole process
    try:
        worker.run(multiply, 1)
    finally:
        worker.close()
