"""Stop requests, with real signals to real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.cluster.signals import STOP_SIGNALS, StopRequest

# says what it sees, and ends when it is asked to; `stubborn` sees it and goes on
LOOP = """
import signal, sys, time
from megatrain.cluster.signals import StopRequest

with StopRequest(same_request=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    while "stubborn" in sys.argv:
        time.sleep(0.01)
print("stopped by", stop.reason.name, flush=True)
if "restored" in sys.argv:
    signal.raise_signal(signal.SIGTERM)
"""


def start(*arguments: str, same_request: float = 0.3) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(same_request), *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ask(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """The first request, which has been seen on return."""
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_one_signal_lets_the_loop_end(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert output == f"asked\nstopped by {number.name}\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_the_second_of_a_kind_ends_the_process(number: signal.Signals, code: int) -> None:
    process = start("stubborn")
    ask(process, number)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code


def test_a_second_interrupt_is_a_keyboard_interrupt() -> None:
    process = start("stubborn")
    ask(process, signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("same_request", "numbers"),
    [
        pytest.param(60, (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT), id="in quick succession"),
        pytest.param(0, (signal.SIGTERM, signal.SIGUSR1), id="of other kinds"),
    ],
)
def test_these_are_one_request(same_request: float, numbers: tuple[signal.Signals, ...]) -> None:
    process = start("stubborn", same_request=same_request)
    ask(process, signal.SIGINT)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    time.sleep(0.1)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_the_handlers_come_back() -> None:
    process = start("restored")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_nothing_is_requested_without_a_signal() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.reason is None
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
