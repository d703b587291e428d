"""This process' place among the ranks, as the launcher says it in the environment. Imports nothing heavy."""

import os
from dataclasses import dataclass

from megatrain.cluster.errors import LauncherError

_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_CURE = (
    "Start the ranks by `deepspeed` or `torchrun`, which set all three; for a single process without a launcher, "
    "`unset RANK WORLD_SIZE LOCAL_RANK`"
)


@dataclass(frozen=True)
class RankIdentity:
    """``rank`` of ``world_size`` ranks, the ``local_rank``-th of ``num_local_ranks`` on its host, all from 0.

    is_launched: a launcher said so; else the process is a world of its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1
    is_launched: bool = False


def identity_from_environment() -> RankIdentity:
    """What RANK, WORLD_SIZE, LOCAL_RANK and, where it is set, LOCAL_WORLD_SIZE say; none of them: a process alone.

    Raises:
        LauncherError: some of the first three are set and others not, or they are no numbers that go together.
    """
    missing = [name for name in _TOLD if name not in os.environ]
    if len(missing) == len(_TOLD):
        return RankIdentity()
    if missing:
        there = ", ".join(f"{name}={os.environ[name]}" for name in _TOLD if name not in missing)
        raise LauncherError(
            f"the environment has {there}, but no {' and no '.join(missing)}: a launcher sets RANK, WORLD_SIZE and "
            f"LOCAL_RANK, or none of them. {_CURE}"
        )
    world_size = _number("WORLD_SIZE", 1, None, "a whole number, 1 or more")
    below = f"a whole number from 0 to {world_size - 1}, below WORLD_SIZE = {world_size}"
    num_local_ranks = world_size
    if "LOCAL_WORLD_SIZE" in os.environ:
        num_local_ranks = _number(
            "LOCAL_WORLD_SIZE", 1, world_size, f"a whole number from 1 to WORLD_SIZE, {world_size}"
        )
    rank = _number("RANK", 0, world_size - 1, below)
    return RankIdentity(rank, world_size, _number("LOCAL_RANK", 0, world_size - 1, below), num_local_ranks, True)


def require_address(identity: RankIdentity) -> None:
    """Several ranks meet at MASTER_ADDR:MASTER_PORT.

    Raises:
        LauncherError: one of them is not set, or the port is none.
    """
    if identity.world_size == 1:
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LauncherError(
                f"the environment has WORLD_SIZE={identity.world_size}, but no {name}, where the ranks meet. {_CURE}"
            )
    _number("MASTER_PORT", 1, 65535, "a port, from 1 to 65535")


def let_idle_threads_sleep() -> None:
    """Lets threads without work sleep. Call it before torch is imported, which reads it once; what is set stays.

    OpenMP's threads otherwise wait for their next piece of work at full load. Where something else wants the cores,
    most of the time then goes into waiting: 20 times as many seconds for a small model on a busy host.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _number(name: str, least: int, most: int | None, allowed: str) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) < least or (most or 10**18) < int(text):
        raise LauncherError(f"the environment has {name}={os.environ[name]}; allowed: {allowed}. {_CURE}")
    return int(text)
