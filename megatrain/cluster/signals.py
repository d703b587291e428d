"""Stopping a run from outside: Ctrl-C, Slurm's time limit, a requeue."""

import signal
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While it is entered, a signal only sets ``requested``, for the training loop to see between two steps.

    A second signal of the same kind ends the process at once, for a loop that no longer comes round.
    Signals that follow the first one closely count as the same request: the ``deepspeed`` launcher and
    Slurm both pass a stop on, so a rank gets several within a moment.

    Args:
        signals: what is caught.
        same_request: seconds after a signal in which its repetition changes nothing.
    """

    def __init__(self, signals: Iterable[signal.Signals] = STOP_SIGNALS, same_request: float = 2.0):
        self.reason: signal.Signals | None = None
        self._signals, self._same_request = tuple(signals), same_request
        self._arrived: dict[int, float] = {}
        self._replaced: dict[signal.Signals, signal._HANDLER] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop; ``reason`` is the first signal that did."""
        return self.reason is not None

    def __enter__(self) -> Self:
        for number in self._signals:
            self._replaced[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._arrived.setdefault(number, now)
        if self.reason is None:
            self.reason = signal.Signals(number)
        if first < now - self._same_request:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)  # the shell's code of a process that a signal ended
