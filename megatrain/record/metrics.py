"""The metrics of a run: every record goes to every sink."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatrain.record.records import Event, Record
from megatrain.record.run_folder import RunFolder
from megatrain.record.sinks import Console, JsonLines, Sink, TensorBoard


class Metrics:
    """Hands records to ``sinks``; without any, as on all ranks but one, it is silent."""

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = sinks

    def log(self, record: Record) -> None:
        """Reports a record everywhere. It is on disk when the call returns."""
        for sink in self._sinks:
            sink.write(record)

    def log_event(self, kind: str, step: int, text: str, **fields: Any) -> None:
        """Reports something that happened at ``step``."""
        self.log(Event(kind, step, text, fields))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()


def metrics_of_run(
    run: RunFolder, num_steps: int, resumed_step: int = 0, write_line: Callable[[str], None] = print
) -> Metrics:
    """The metrics of one process of a run: rank 0.

    A resumed run goes on in the same files: what an earlier start recorded after ``resumed_step`` was lost with that
    start, and is dropped.
    """
    return Metrics([
        Console(num_steps, write_line),
        JsonLines(run.metrics, resumed_step),
        TensorBoard(run.tensorboard, resumed_step, run.config.read_text(encoding="utf-8")),
    ])  # fmt: skip


def evaluated_sets(metrics: Path, step: int) -> set[str]:
    """The validation sets that have a record of an evaluation at ``step`` in the file ``metrics``."""
    records = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return {row["set"] for row in records if row["kind"] == "evaluation" and row["step"] == step}
