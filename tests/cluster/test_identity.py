"""What the launcher's variables say, what is refused in them, and threads."""

from collections.abc import Iterator

import pytest
import torch

from launch import pretrain
from megatrain.cluster.errors import LauncherError
from megatrain.cluster.identity import RankIdentity, identity_from_environment, require_address
from megatrain.engine.start import start_distributed

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of a process that no launcher started."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test's code sets goes, too
        monkeypatch.delenv(name)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, text: str) -> None:
    for word in text.split():
        environment.setenv(*word.split("=", 1))


def test_places(environment: pytest.MonkeyPatch) -> None:
    assert identity_from_environment() == RankIdentity(0, 1, 0, 1, False)
    set_all(environment, "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1")
    assert identity_from_environment() == RankIdentity(5, 8, 1, 8, True)
    set_all(environment, "LOCAL_WORLD_SIZE=4")
    assert identity_from_environment() == RankIdentity(5, 8, 1, 4, True)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=2", "WORLD_SIZE=2, but no RANK and no LOCAL_RANK"),
        ("RANK=0", "RANK=0, but no WORLD_SIZE and no LOCAL_RANK"),
        ("LOCAL_RANK=0", "LOCAL_RANK=0, but no RANK and no WORLD_SIZE"),
        ("RANK=0 WORLD_SIZE=2", "but no LOCAL_RANK"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0", "RANK=2; allowed: a whole number from 0 to 1"),
        ("RANK=-1 WORLD_SIZE=2 LOCAL_RANK=0", "RANK=-1; allowed"),
        ("RANK=0 WORLD_SIZE=two LOCAL_RANK=0", "WORLD_SIZE=two; allowed: a whole number, 1 or more"),
        ("RANK=0 WORLD_SIZE=0 LOCAL_RANK=0", "WORLD_SIZE=0; allowed"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK=2; allowed"),
        ("RANK= WORLD_SIZE=2 LOCAL_RANK=0", "RANK=; allowed"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3", "LOCAL_WORLD_SIZE=3; allowed"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0", "WORLD_SIZE=2, but no MASTER_ADDR"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a", "WORLD_SIZE=2, but no MASTER_PORT"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=x1", "MASTER_PORT=x1; allowed: a port"),
    ],
)  # fmt: skip
def test_half_set_and_odd_variables_get_one_message(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: str, said: str
) -> None:
    set_all(environment, variables)
    with pytest.raises(LauncherError, match="unset RANK WORLD_SIZE LOCAL_RANK") as caught:
        require_address(identity_from_environment())
    assert said in str(caught.value)
    assert pretrain.main(["--data.train", "nowhere"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and said in errors


def test_a_taken_port_is_named(environment: pytest.MonkeyPatch) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    set_all(environment, f"RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={store.port}")
    with pytest.raises(LauncherError, match=f"another program listens at 127.0.0.1:{store.port}.*--master_port"):
        start_distributed()


@pytest.fixture
def threads() -> Iterator[int]:
    """A number that no rule gives; torch's own comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("chosen", [None, "3"])
def test_threads_that_the_user_chose_stay(environment: pytest.MonkeyPatch, threads: int, chosen: str | None) -> None:
    environment.setattr("os.sched_getaffinity", lambda _: set(range(2)))
    if chosen is not None:
        environment.setenv("OMP_NUM_THREADS", chosen)
    start_distributed()
    assert torch.get_num_threads() == (2 if chosen is None else threads)
