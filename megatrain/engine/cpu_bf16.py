"""Usable BF16 on CPUs that have no BF16 instructions.

Without AVX-512, torch multiplies BF16 matrices in a loop that is up to a hundred times slower than the FP32
library. Multiplying FP32 copies and rounding the result is the same arithmetic: BF16 products are exact in
FP32, which the loop sums in as well.
"""

import torch
from torch import Tensor

_OVERRIDES: list[torch.library.Library] = []  # an override lives as long as its object


def speed_up_bf16_matmul(wanted: bool) -> None:
    """Replaces torch's ``mm`` and ``bmm`` on a CPU without BF16 ones where ``wanted``, else puts them back.

    Products of every type then pass through Python, in the whole process: so a run in FP32 does without.
    """
    wanted = wanted and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if wanted == bool(_OVERRIDES):
        return
    if not wanted:
        _OVERRIDES.clear()
        return
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm"):
        library.impl(name, _through_fp32(name), "CPU")
    _OVERRIDES.append(library)


def _through_fp32(name: str):  # type: ignore[no-untyped-def]
    multiply_into = getattr(torch.ops.aten, name).out  # another operator: not overridden

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        wide = (torch.float32,) * 2 if a.dtype == torch.bfloat16 else (a.dtype, b.dtype)
        result = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=wide[0], device=a.device)
        multiply_into(a.to(wide[0]), b.to(wide[1]), out=result)
        return result.to(a.dtype)

    return multiply
