"""The same bits in every run of a layout (`train.deterministic`); docs/parity.md says what differs without it."""

import os

import torch

# cuBLAS sums in an order of its own on each stream unless its workspace is fixed; NCCL else chooses how to sum by what
# it measures of the network, and may let a switch do it. Read when their first product and communicator are made.
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def make_deterministic() -> None:
    """Takes the choices from this process that depend on time or on the order of arrival.

    To be called before the process group is made. An operator that has no deterministic kernel raises RuntimeError
    when it is used. Variables of the environment that are set stay as they are.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)  # torch.compile, too, then measures no kernels to choose from
    # nothing here reads what was not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def num_cpu_threads(deterministic: bool) -> int:
    """Torch's threads of this rank, which may depend on the other ranks of this host: they share its cores.

    Sums are split over threads, so a deterministic run has the threads that it had if all its ranks were on one host.
    """
    ranks = os.environ["WORLD_SIZE"]
    if not deterministic:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", ranks)
    return max(1, len(os.sched_getaffinity(0)) // int(ranks))
