"""Where the records of a run go: the console, ``metrics.jsonl`` and TensorBoard."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatrain.disk.durable import write_durably
from megatrain.record.records import Record


class Sink(Protocol):
    """A reader of records. What it was given has arrived when the call returns."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Console:
    """A line of each record that has one, behind the step that the run of ``num_steps`` stands at."""

    def __init__(self, num_steps: int, write_line: Callable[[str], None]):
        self._total, self._write_line = str(num_steps), write_line

    def write(self, record: Record) -> None:
        if (line := record.line()) is not None:
            self._write_line(f"step {record.step:>{len(self._total)}}/{self._total} | {line}")

    def close(self) -> None:
        pass


class JsonLines:
    """One JSON object a line. Goes on in ``path``, without the records of later steps than ``last_step``."""

    def __init__(self, path: Path, last_step: int):
        _drop_after(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(_finite(record.row()), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Curves in ``folder``, without the points of later steps than ``last_step``; and the text of the config."""

    def __init__(self, folder: Path, last_step: int, config: str):
        # imported here: seconds, and only one rank needs it
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=last_step + 1)
        # four spaces: a code block in TensorBoard's Markdown
        self._board.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()), last_step)
        self._board.flush()

    def write(self, record: Record) -> None:
        for name, value in record.scalars().items():
            if value is not None:
                self._board.add_scalar(name, value, record.step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def _finite(value: Any) -> Any:
    """``value`` at any depth as JSON can have it, which has no NaN and no infinity: readers get null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    """Keeps the records up to ``step``."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_durably(path, "".join(line for line in lines if _is_up_to(step, line)).encode())


def _is_up_to(step: int, line: str) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except ValueError:  # cut short by a crash
        return False
