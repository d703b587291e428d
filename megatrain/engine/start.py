"""Joins this process to the others."""

import logging
import os
import warnings
from functools import cache

import torch

from megatrain.engine.cpu_bf16 import speed_up_bf16_matmul
from megatrain.engine.determinism import make_deterministic, num_cpu_threads

_LAUNCHER_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def start_distributed(deterministic: bool = False) -> torch.device:
    """Initialises the process group (NCCL on GPUs, gloo on CPUs) and returns this rank's device.

    Started without a launcher, the process is a world of its own. ``deterministic``: `train.deterministic`.
    """
    if deterministic:
        make_deterministic()
    deepspeed = import_deepspeed()
    alone = "RANK" not in os.environ
    for name, value in _LAUNCHER_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # ranks of one host share its cores: more threads than cores wait for each other
        torch.set_num_threads(num_cpu_threads(deterministic))
        speed_up_bf16_matmul()
    if alone:
        os.environ["MASTER_PORT"] = "0"
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


@cache  # setting a level empties the caches of every logger, which costs a millisecond
def import_deepspeed():  # type: ignore[no-untyped-def]
    """Imports DeepSpeed, quietly and without the compiler.

    ``deepspeed.init_distributed`` would compile a shared-memory operator for CPUs that training does
    not need; a machine without g++ could not start.
    """
    warnings.filterwarnings("ignore", message=".*is deprecated.*", module="torch.distributed.*")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
