"""Stop requests, with real signals to real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.train.signals import STOP_SIGNALS, StopRequest

# says what it sees, and ends when it is asked to; `stubborn` never looks
LOOP = """
import signal, sys, time
from megatrain.train.signals import StopRequest

stubborn = "stubborn" in sys.argv
with StopRequest(same_request=0.3) as stop:
    print("ready", flush=True)
    while stubborn or not stop.requested:
        time.sleep(0.01)
print("stopped by", stop.reason.name, flush=True)
if "restored" in sys.argv:
    signal.raise_signal(signal.SIGTERM)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_one_signal_lets_the_loop_end(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert output == f"stopped by {number.name}\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_the_second_of_a_kind_ends_the_process(number: signal.Signals, code: int) -> None:
    process = start("stubborn")
    process.send_signal(number)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code


def test_a_second_interrupt_is_a_keyboard_interrupt() -> None:
    process = start("stubborn")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


def test_signals_in_quick_succession_and_of_other_kinds_are_one_request() -> None:
    process = start("stubborn")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
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
