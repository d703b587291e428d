"""FP16 on CPUs.

DeepSpeed refuses FP16 where the CPU has no FP16 instructions. torch computes it there all the same, through FP32,
so a run that is meant for GPUs can be tried on any machine.
"""

import torch

from megatrain.engine.zero.import_once import import_deepspeed


def allow_fp16_on_cpus() -> None:
    """Lets DeepSpeed build FP16 engines in this process; nothing changes where there are GPUs."""
    if torch.cuda.is_available():
        return
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
