"""What a run reports: a console line, ``metrics.jsonl`` and TensorBoard, from the same records."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatrain.disk.durable import write_durably
from megatrain.record.ledger import SourceRecord
from megatrain.record.run_folder import RunFolder
from megatrain.record.throughput import Hardware

ONLY_SET = "validation"
"""Name of a validation set that the config gives none."""
_LONGEST_PERPLEXITY = 1e6
"""Larger ones say nothing by their digits, and are shown by their power of ten."""


@dataclass(frozen=True)
class StepRecord:
    """One logging step. ``tokens``, ``flops`` (the model's own operations, see ``Work``; both over all ranks),
    ``seconds`` and ``num_skipped`` (steps whose gradients were not finite, and which changed nothing) cover all steps
    since the record before; ``skipped``: whether this one was; ``routing``: of a mixture's layers, as
    ``RoutingReport.read`` gives it."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    tokens: int
    flops: float
    seconds: float
    num_skipped: int = 0
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class MetricsLog:
    """Writes the metrics of a run into its folder. One process of the run has one: rank 0.

    Every record is on disk when the call returns. A resumed run goes on in the same files: what an
    earlier start recorded after ``resumed_step`` was lost with that start, and is dropped.
    """

    def __init__(
        self,
        run: RunFolder,
        num_steps: int,
        hardware: Hardware,
        resumed_step: int = 0,
        write_line: Callable[[str], None] = print,
    ):
        # imported here: seconds, and only one rank needs it
        from torch.utils.tensorboard import SummaryWriter

        self.num_steps, self.hardware = num_steps, hardware
        self._previous_step, self._write_line = resumed_step, write_line
        self._run = run
        _drop_after(run.metrics, resumed_step)
        self._file = run.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run.tensorboard), purge_step=resumed_step + 1)
        # four spaces: a code block in TensorBoard's Markdown
        config = run.config.read_text(encoding="utf-8")
        self._board.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()), resumed_step)
        self._board.flush()

    def log_step(self, record: StepRecord) -> None:
        """Reports a logging step everywhere."""
        mfu = self.hardware.mfu(record.flops / record.seconds)
        self._write_line(self._line(record, mfu))
        measured = {"tokens_per_second": record.tokens_per_second, "mfu": mfu}
        row = {"kind": "step", **asdict(record), **measured}
        if not record.routing:
            del row["routing"]
        self._append(row)
        self._scalars(
            record.step,
            {
                "train/loss": record.loss,
                "train/grad_norm": record.grad_norm,
                "train/lr": record.lr,
                "train/loss_scale": record.loss_scale,
                "train/skipped": float(record.skipped),
                "train/num_skipped": float(record.num_skipped),
                "throughput/tokens_per_second": record.tokens_per_second,
                "throughput/mfu": mfu,
                **_routing_scalars(record.routing),
            },
        )
        self._previous_step = record.step

    def log_sources(self, step: int, sources: Mapping[str, SourceRecord]) -> None:
        """Reports what the sources of the training data have given so far; not on the console."""
        self._append({"kind": "sources", "step": step, "sources": {name: asdict(r) for name, r in sources.items()}})
        for name, record in sources.items():
            self._scalars(step, {f"data/{name}/{key}": value for key, value in asdict(record).items()})

    def log_evaluation(self, step: int, loss: float, name: str = ONLY_SET) -> None:
        """Reports an evaluation of the weights after ``step``, on the validation set ``name``, everywhere.

        ``loss``: mean over the tokens, in nats; the perplexity is e to its power.
        """
        perplexity = _perplexity(loss)
        shown = f"{perplexity:,.2f}" if perplexity < _LONGEST_PERPLEXITY else f"{perplexity:.3g}"
        title, tag = ("validation", "evaluation") if name == ONLY_SET else (f"validation {name}", f"evaluation/{name}")
        self._write_line(f"{self._progress(step)} | {title} loss {loss:.4f} | perplexity {shown}")
        self._append({"kind": "evaluation", "step": step, "set": name, "loss": loss, "perplexity": perplexity})
        self._scalars(step, {f"{tag}/loss": loss, f"{tag}/perplexity": perplexity})

    def log_event(self, kind: str, step: int, line: str, **fields: Any) -> None:
        """Reports something that happened at ``step``: a line, a record of its own kind, its numbers as scalars."""
        self._write_line(f"{self._progress(step)} | {line}")
        self._append({"kind": kind, "step": step, **fields})
        numbers = {f"{kind}/{name}": float(value) for name, value in fields.items() if isinstance(value, int | float)}
        self._scalars(step, dict(numbers))

    def evaluated(self, step: int) -> set[str]:
        """The validation sets that have a record of an evaluation at ``step``."""
        records = map(json.loads, self._run.metrics.read_text(encoding="utf-8").splitlines())
        return {row["set"] for row in records if row["kind"] == "evaluation" and row["step"] == step}

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _progress(self, step: int) -> str:
        total = str(self.num_steps)
        return f"step {step:>{len(total)}}/{total}"

    def _line(self, record: StepRecord, mfu: float | None) -> str:
        seconds_per_step = record.seconds / (record.step - self._previous_step)
        remaining = timedelta(seconds=round(seconds_per_step * (self.num_steps - record.step)))
        parts = [
            self._progress(record.step),
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3f}",
            f"lr {record.lr:.2e}",
            f"{record.tokens_per_second:,.0f} tokens/s",
            "mfu -" if mfu is None else f"mfu {mfu:.1%}",
            f"loss scale {record.loss_scale:g}",
            f"eta {remaining}",
        ]
        if record.num_skipped > record.skipped:
            parts.append(f"{record.num_skipped} steps skipped")
        return " | ".join(parts + ["skipped (gradients not finite)"] * record.skipped)

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def _scalars(self, step: int, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()


def _perplexity(loss: float) -> float:
    """e to the power of ``loss``; infinity where no float is so large (a loss above 709)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _routing_scalars(routing: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """``largest_load`` is a multiple of the even share: 1 is perfect balance."""
    scalars: dict[str, float | None] = {}
    for layer, values in routing.items():
        scalars[f"routing/{layer}/largest_load"] = max(values["load"]) * len(values["load"])
        scalars[f"routing/{layer}/entropy"] = values["entropy"]
        scalars[f"routing/{layer}/drop_rate"] = values["drop_rate"]
    return scalars


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
