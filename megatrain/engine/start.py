"""Joins this process to the others."""

import os

import torch

from megatrain.cluster.errors import LauncherError
from megatrain.cluster.identity import identity_from_environment, require_address
from megatrain.engine.determinism import make_deterministic, num_cpu_threads
from megatrain.engine.zero.import_once import import_deepspeed

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def start_distributed(deterministic: bool = False) -> torch.device:
    """Initialises the process group (NCCL on GPUs, gloo on CPUs) and returns this rank's device.

    Started without a launcher, the process is a world of its own. On CPUs the ranks of a host share its cores, unless
    OMP_NUM_THREADS says how many threads each has. ``deterministic``: `train.deterministic`.

    Raises:
        LauncherError: the environment is not what a launcher sets, or the ranks can't meet.
    """
    identity = identity_from_environment()
    require_address(identity)
    if deterministic:
        make_deterministic()
    deepspeed = import_deepspeed()
    if not identity.is_launched:
        os.environ.update(_ALONE)
    if torch.cuda.is_available():
        device = torch.device("cuda", identity.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # more threads than cores wait for each other
            torch.set_num_threads(num_cpu_threads(deterministic))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not identity.is_launched:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    except torch.distributed.DistNetworkError as error:
        raise LauncherError(_cannot_meet(str(error))) from error
    return device


def _cannot_meet(reason: str) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in reason:
        return (
            f"another program listens at {where}, where the ranks of this run were to meet; most likely another run. "
            "Wait for its end, or give this one a port of its own: `deepspeed --master_port 29600 …` (the default is "
            "29500), `torchrun --master-port 29600 …`"
        )
    return (
        f"the ranks can't meet at {where}: {reason.splitlines()[0]}. MASTER_ADDR must name the host of rank 0, as all "
        "hosts know it, and no firewall may close MASTER_PORT"
    )
