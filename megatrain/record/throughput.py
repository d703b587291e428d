"""How much of the hardware a run uses: model FLOPs utilisation (Chowdhery et al. 2022, appendix B)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.rows import Batch
from megatrain.spec.counts import flops_per_token
from megatrain.spec.schema import ModelSpec

# Peak dense 16-bit (BF16, FP16) operations per second of one device, from NVIDIA's data sheets of each
# product, which print the double for 2:4 sparsity: A100 624e12; H100 SXM and H200 SXM 1979e12, PCIe 1513e12,
# NVL 1671e12; HGX B200 4.5e15; B200 in GB200 5e15. Matched by the first line whose words are all in the
# device's name, so the special products stand first.
_PEAK_16_BIT: list[tuple[tuple[str, ...], float]] = [
    (("GB200",), 2.5e15),
    (("B200",), 2.25e15),
    (("H200", "NVL"), 835.5e12),
    (("H200",), 989.5e12),
    (("H100", "NVL"), 835.5e12),
    (("H100", "PCIe"), 756.5e12),
    (("H100",), 989.5e12),
    (("A100",), 312e12),
]


def peak_flops(device_name: str | None, dtype: str, peak_tflops: float | None = None) -> float | None:
    """Peak operations per second of one device, None where it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it; None on CPU.
        dtype: ``precision.dtype``; the table holds the 16-bit peaks only.
        peak_tflops: ``train.peak_tflops``; it goes before the table.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device_name is None or dtype not in ("bf16", "fp16"):
        return None
    return next((peak for words, peak in _PEAK_16_BIT if all(word in device_name for word in words)), None)


@dataclass(frozen=True)
class Hardware:
    """What a run could do at most: ``num_devices`` of ``peak_flops`` (None: unknown) operations per second each."""

    num_devices: int
    peak_flops: float | None

    def mfu(self, flops_per_second: float) -> float | None:
        """Share of the peak that the model's own operations use, None where the peak is unknown."""
        if self.peak_flops is None:
            return None
        return flops_per_second / (self.num_devices * self.peak_flops)


def hardware_of(config: ResolvedRun, device: torch.device) -> Hardware:
    """All ranks' devices, if they are like this one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Hardware(dist.get_world_size(), peak_flops(name, config.precision.dtype, config.train.peak_tflops))


class Work:
    """What the model's own operations since the last reading were: those of the tokens that it really read.

    A token's attention counts for its sequence, as long as it was in that step of a ramp, or for its document where
    attention stays inside documents. Padding is no work.

    Args:
        counts: whether this rank's sequences count: of the ranks that share them, one's.
    """

    def __init__(self, model: ModelSpec, device: torch.device, counts: bool):
        self._model, self._device, self._counts = model, device, counts
        self._tokens = self._pairs = 0

    def add(self, batch: Batch) -> None:
        """A step of this rank."""
        if self._counts:
            tokens, pairs = tokens_and_pairs(batch)
            self._tokens += tokens
            self._pairs += pairs

    def read(self, over_all_ranks: Callable[[Tensor], Tensor]) -> float:
        """Operations of all ranks; then the count starts anew. Collective."""
        own = torch.tensor([self._tokens, self._pairs], dtype=torch.float64, device=self._device)
        self._tokens = self._pairs = 0
        tokens, pairs = over_all_ranks(own).tolist()
        return tokens * flops_per_token(self._model, pairs / tokens) if tokens else 0.0


def tokens_and_pairs(batch: Batch) -> tuple[int, int]:
    """Tokens without padding, and the pairs of them that stand in one document (in one sequence, where those are not
    told apart): the sum of the squared lengths."""
    num_sequences, seq_len = batch.tokens.shape
    lengths = torch.full((num_sequences,), seq_len) if batch.lengths is None else batch.lengths
    if batch.positions is None:
        return int(lengths.sum()), int(lengths.square().sum())
    # the positions of a document of d tokens sum to (d^2 - d) / 2; padding counts as one more, from position 0 on
    squares = 2 * int(batch.positions.sum()) + batch.positions.numel()
    return int(lengths.sum()), squares - int((seq_len - lengths).square().sum())
