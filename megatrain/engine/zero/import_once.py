"""The one import of DeepSpeed."""

import logging
import os
import warnings
from functools import cache

import torch


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
