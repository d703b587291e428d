"""How much of the hardware a run uses: model FLOPs utilisation (Chowdhery et al. 2022, appendix B)."""

from dataclasses import dataclass

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

    def mfu(self, flops_per_token: float, tokens_per_second: float) -> float | None:
        """Share of the peak that the model's own operations use, None where the peak is unknown."""
        if self.peak_flops is None:
            return None
        return flops_per_token * tokens_per_second / (self.num_devices * self.peak_flops)
