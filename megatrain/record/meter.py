"""What the steps between two records have done."""

import time

from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.rows import Batch
from megatrain.data.feed.training import TrainingData
from megatrain.engine.engine import Engine, StepResult
from megatrain.record.ledger import Ledger
from megatrain.record.records import SourcesRecord, StepRecord
from megatrain.record.throughput import Hardware, Work


class Meter:
    """Counts every step, and is read at those that are logged. Adding a step does not wait for the device."""

    def __init__(self, config: ResolvedRun, engine: Engine, data: TrainingData, hardware: Hardware, step: int):
        self._config, self._engine, self._hardware = config, engine, hardware
        self._ledger = Ledger(data, engine)
        # context ranks share sequences
        self._work = Work(config.model, engine.mesh.device, counts=engine.mesh.coordinate("cp") == 0)
        self._read_step = step
        self._tokens = self._num_skipped = 0
        self._since = time.perf_counter()

    def add(self, batch: Batch, result: StepResult) -> None:
        """A step that was made or skipped."""
        self._ledger.add(batch, result.losses)
        self._work.add(batch)
        self._tokens += result.tokens
        self._num_skipped += result.skipped

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self._since += seconds

    def read(self, step: int, result: StepResult) -> tuple[StepRecord, SourcesRecord]:
        """What was counted, up to ``step``, which gave ``result``; then all begins anew. Waits for the device.
        Collective."""
        loss, norm = float(result.loss), float(result.grad_norm)
        sources = SourcesRecord(step, self._ledger.counts(step))
        flops = self._work.read(self._engine.over_all_ranks)
        now = time.perf_counter()
        seconds = now - self._since
        record = StepRecord(
            step=step,
            loss=loss,
            grad_norm=norm,
            lr=result.lr,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            tokens=self._tokens,
            flops=flops,
            seconds=seconds,
            num_steps=step - self._read_step,
            steps_left=self._config.train.steps - step,
            mfu=self._hardware.mfu(flops / seconds),
            num_skipped=self._num_skipped,
            routing={} if result.routing is None else result.routing.read(),
        )
        self._read_step, self._since = step, now
        self._tokens = self._num_skipped = 0
        return record, sources
