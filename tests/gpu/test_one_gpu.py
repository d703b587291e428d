"""On a GPU a step comes to what it comes to on the CPU, and the kernels that only GPUs have are right."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.config.schema import TrainConfig
from megatrain.models.build import build_model
from megatrain.models.parts.document_attention import KERNELS
from megatrain.models.parts.documents import documents_of, visible_pairs
from megatrain.models.parts.experts import grouped_matmul
from megatrain.models.recompute import apply_recompute
from megatrain.optim.muon import orthogonalize
from megatrain.parallel.dropout import dropout_keys
from megatrain.parity.bands import Bands
from megatrain.parity.compare import compare
from tests.gpu.captures import configs
from tests.layouts import ONE_PROCESS, global_batch, random_positions, run_config
from tests.models.test_recompute import MODES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By device and config, a step; the two run side by side in processes of their own."""
    folder: Path = tmp_path_factory.mktemp("captures")
    command = [sys.executable, "-m", "tests.gpu.captures"]
    running = {device: subprocess.Popen([*command, device, folder / device]) for device in ("cpu", "cuda")}
    assert [process.wait() for process in running.values()] == [0, 0]
    return {device: pickle.loads((folder / device).read_bytes()) for device in running}


@pytest.mark.parametrize("name", configs())
def test_a_step_equals_the_cpus(captured: dict[str, dict[str, Any]], name: str) -> None:
    """In the bands of two layouts, for the same reason: sums in another order. Muon's steps are made in BF16 on GPUs
    alone, and have a test of their own."""
    bands = Bands([[cpus] for cpus in captured["cpu"][name]])
    found = compare(captured["cuda"][name], bands)
    if name == "muon":
        found = [difference for difference in found if not difference.what.startswith("update of layers.")]
    assert not found, "\n".join(map(str, found))


def test_muons_directions_in_bf16() -> None:
    """Of a matrix whose singular values are within a factor of 10, as BF16 tells them apart."""
    left, right = (
        torch.linalg.qr(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)))[0] for n in (128, 64)
    )
    matrix = left @ torch.diag(torch.linspace(0.1, 1.0, 64)) @ right.T
    exact, found = orthogonalize(matrix), orthogonalize(matrix.to(CUDA)).float().cpu()
    # five steps, each rounded by 2^-9, and each multiplies what was off by up to 3.4: in BF16 on a CPU 0.033
    assert (found - exact).norm() / exact.norm() < 5e-2


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", ["per_document", "flex", "varlen"])
def test_a_kernel_equals_the_dense_mask(kernel: str, groups: int) -> None:
    generator = torch.Generator(CUDA).manual_seed(1)
    positions = torch.cat([torch.arange(n) for n in (300, 1, 130, 593)]).to(CUDA).expand(2, -1)
    length = positions.shape[1]
    shapes = ((2, heads, length, 64) for heads in (4, groups, groups))
    inputs = [torch.randn(shape, generator=generator, device=CUDA, dtype=torch.bfloat16) for shape in shapes]
    weights = torch.randn((2, 4, length, 64), generator=generator, device=CUDA)
    documents = documents_of(positions, KERNELS[kernel])
    mask = visible_pairs(documents, length, length)

    def run(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        own = [x.to(dtype).requires_grad_() for x in inputs]
        mixed = attend(*own)
        return [mixed, *torch.autograd.grad((mixed * weights).sum(), own)]

    ours = run(lambda q, k, v: KERNELS[kernel].attend(q, k, v, documents.plan), torch.bfloat16)
    exact = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=groups < 4), torch.float64)
    for mine, reference in zip(ours, exact, strict=True):
        error = (mine.double() - reference).norm() / reference.norm()
        assert error < 1e-2, "BF16 rounds the weights and each result by 2^-9"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_grouped_product_equals_the_loop(dtype: torch.dtype) -> None:
    counts = torch.tensor([40, 0, 3, 213, 0], device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(1)
    rows, weight, factor = (
        torch.randn(shape, generator=generator, device=CUDA, dtype=dtype)
        for shape in ((256, 64), (5, 64, 32), (256, 32))
    )

    def run(product: Any, *inputs: Tensor) -> list[Tensor]:
        own = [x.clone().requires_grad_() for x in inputs]
        y = product(*own)
        return [y, *torch.autograd.grad((y * factor).sum(), own)]

    def loop(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([part @ matrix for part, matrix in zip(x.split(counts.tolist()), w, strict=True)])

    ours = run(lambda x, w: grouped_matmul(x, w, counts), rows, weight)
    exact = run(loop, rows.double(), weight.double())
    for mine, reference in zip(ours, exact, strict=True):
        error = (mine.double() - reference).norm() / reference.norm()
        assert error < (1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(value) for value in mode.values()))
def test_recomputation_has_the_same_bits(mode: dict[str, Any], mixture: bool) -> None:
    """With torch's deterministic kernels: others add in an order of their own each time."""
    more = {"experts.num_experts": 8, "experts.hidden_size": 32} if mixture else {}
    config = run_config("llama", ONE_PROCESS, model={"dropout": 0.1, "attention.dropout": 0.1, **more})
    batch, gradients = global_batch(1), []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for own in ({}, mode):
            model = build_model(config.model, 3, CUDA).train().to(torch.bfloat16)
            apply_recompute(model, TrainConfig.model_validate(own))
            for _ in range(2):  # the second run finds what the first decided
                keys = dropout_keys(5, batch.sample_ids.to(CUDA))
                model(batch.tokens.to(CUDA), batch.labels.to(CUDA), keys).sum().backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_documents_train_with_the_kernels_of_gpus(kernel: str) -> None:
    """A model's losses and gradients, in BF16, as with the dense mask."""
    batch = global_batch(1)
    positions = random_positions(torch.Generator().manual_seed(2)).to(CUDA)
    found = []
    for name in ("dense", kernel):
        shape = {"attention.documents": name, "hidden_size": 128, "attention.num_heads": 4, "attention.num_kv_heads": 2}
        model = build_model(run_config("llama", ONE_PROCESS, model=shape).model, 3, CUDA).to(torch.bfloat16)
        losses = model(batch.tokens.to(CUDA), batch.labels.to(CUDA), positions_BT=positions)
        losses.sum().backward()
        norm = torch.stack([p.grad.float().norm() for p in model.parameters()]).norm()
        found.append((losses.sum().item(), norm.item()))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3)  # BF16 rounds each activation by 2^-9
    assert found[1][1] == pytest.approx(found[0][1], rel=3e-2)
