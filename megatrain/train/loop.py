"""The training loop: steps, and what hangs on them."""

import contextlib
import json
import time
from collections.abc import Collection, Generator

import torch.distributed as dist

from megatrain.checkpoint.resume import Resumed
from megatrain.checkpoint.store.lock import FolderLock
from megatrain.cluster.signals import StopRequest
from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.loader import Loader
from megatrain.data.feed.rows import Batch
from megatrain.data.feed.training import TrainingData
from megatrain.data.feed.validation import num_batches
from megatrain.disk.durable import write_durably
from megatrain.engine.engine import Engine, StepResult
from megatrain.record.meter import Meter
from megatrain.record.metrics import Metrics, evaluated_sets, metrics_of_run
from megatrain.record.records import EvaluationRecord
from megatrain.record.run_folder import RunFolder
from megatrain.record.throughput import hardware_of
from megatrain.train.agreement import Agreement
from megatrain.train.health import Health
from megatrain.train.saving import Saving, report_resume, restore


def train(
    config: ResolvedRun,
    engine: Engine,
    data: TrainingData,
    validation: dict[str, Loader],
    lock: FolderLock | None = None,
) -> bool:
    """Trains from where the run's folder stands to ``train.steps``; evaluates, saves. Collective.

    Returns whether the run is complete (a signal may have stopped it).

    Raises:
        CheckpointError: what there is can't be resumed; StorageError: saving failed again and again, or at the end.
        ConfigError: the checkpoint is of a later step than the last.
        DataError: the data can't be read, or end before the run does.
        NonFiniteError: too many steps in a row have no finite gradients, or the last state is not finite.
    """
    resumed = restore(config, engine, data)
    step = 0 if resumed is None else resumed.step
    data.require_samples(config.train.steps)
    run = RunFolder.of(config)
    first = engine.mesh.rank == 0
    if first:
        write_durably(run.data, (json.dumps(data.state(step), indent=2) + "\n").encode())
    with (
        StopRequest() as stop,
        metrics_of_run(run, config.train.steps, step, _say) if first else Metrics() as metrics,
    ):
        report_resume(metrics, config, resumed)
        return Trainer(config, engine, data, validation, resumed, metrics, stop, lock).train()


class Trainer:
    """One start of a run: from the step that was ``resumed`` to the last, or to the one at which it is told to stop."""

    def __init__(
        self,
        config: ResolvedRun,
        engine: Engine,
        data: TrainingData,
        validation: dict[str, Loader],
        resumed: Resumed | None,
        metrics: Metrics,
        stop: StopRequest,
        lock: FolderLock | None,
    ):
        self.config, self.engine, self.data, self.validation = config, engine, data, validation
        self.metrics, self.stop = metrics, stop
        self.step, self.trained_tokens = (0, 0) if resumed is None else (resumed.step, resumed.tokens)
        self.health = Health(config, engine)
        self.saving = Saving(config, engine, data, self.health, resumed, metrics, lock)
        self.agreement = Agreement(lambda: (self.saving.has_news, stop.requested))
        self.meter = Meter(config, engine, data, hardware_of(config, engine.mesh.device), self.step)

    def train(self) -> bool:
        """Makes the steps that are left. Returns whether all are made; raises what ``loop.train`` does."""
        if self.step >= self.config.train.steps:
            return self._nothing_is_left()
        with contextlib.closing(self._batches()) as batches:
            for batch in batches:
                self.agreement.begin()
                self._make_step(batch)
                self._end_if_skipped_too_often()
                if self._is_due(self.config.train.eval_every):
                    self._evaluate()
                save_ended, told_to_stop = self.agreement.result()
                if save_ended:
                    self.saving.finish(self.step)
                if self._is_due(self.config.checkpoint.save_every):
                    self._save()
                if told_to_stop:
                    self._report_stop()
                    break
        finished = self.step >= self.config.train.steps
        if finished and not self._is_due(self.config.train.eval_every):
            self._evaluate()
        self.saving.save_at_the_end(self.step, self.trained_tokens, finished)
        return finished

    def _make_step(self, batch: Batch) -> None:
        result = self.engine.train_step(batch, self.step + 1)
        self.step += 1
        self.trained_tokens += result.tokens
        self.meter.add(batch, result)
        self.health.add(self.step, batch, result)
        if self._is_due(self.config.train.log_every) or self.step in (1, self.config.train.steps):
            self._log(result)

    def _log(self, result: StepResult) -> None:
        for record in self.meter.read(self.step, result):
            self.metrics.log(record)

    def _evaluate(self, but: Collection[str] = ()) -> None:
        """Mean loss over the first ``eval_batches`` batches of each validation set, ``but`` some."""
        start = time.perf_counter()
        for name, loader in self.validation.items():
            if name in but:
                continue
            batches = range(min(self.config.train.eval_batches, num_batches(loader)))
            results = [self.engine.evaluate(loader.batch(i)) for i in batches]
            loss = sum(float(total) for total, _ in results) / sum(count for _, count in results)
            self.metrics.log(EvaluationRecord(self.step, loss, name))
        self.meter.leave_out(time.perf_counter() - start)

    def _save(self) -> None:
        start = time.perf_counter()
        self.saving.save(self.step, self.trained_tokens)
        self.meter.leave_out(time.perf_counter() - start)

    def _end_if_skipped_too_often(self) -> None:
        if self.health.is_at_its_end:
            self.saving.finish(self.step)
            raise self.health.error(self.step, self.saving.newest)

    def _nothing_is_left(self) -> bool:
        """An earlier start has made all steps: only evaluations that it did not come to are made up."""
        first = self.engine.mesh.rank == 0
        evaluated = [evaluated_sets(RunFolder.of(self.config).metrics, self.step) if first else set()]
        dist.broadcast_object_list(evaluated, src=0)
        self._evaluate(but=evaluated[0])
        text = f"an earlier start made all {self.step} steps: nothing is left to do. To go on, raise train.steps"
        self.metrics.log_event("done", self.step, text)
        self.saving.save_at_the_end(self.step, self.trained_tokens, finished=True)
        return True

    def _report_stop(self) -> None:
        who = self.stop.reason.name if self.stop.reason is not None else "another rank"
        self.metrics.log_event("stop", self.step, f"stopping after step {self.step}, as {who} asks", reason=who)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _batches(self) -> Generator[Batch, None, None]:
        mesh = self.engine.mesh
        loader = self.data.loader(mesh.coordinate("dp"), mesh.topology.dp, pin=mesh.device.type == "cuda")
        return loader.batches(self.step, self.config.train.steps)


def _say(line: str) -> None:
    print(line, flush=True)
