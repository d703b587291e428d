"""The training loop: steps, and what hangs on them."""

import contextlib
import json
import time
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist

from megatrain.checkpoint.resume import Resumed
from megatrain.checkpoint.store.lock import FolderLock
from megatrain.cluster.signals import StopRequest
from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.loader import Loader
from megatrain.data.feed.training import TrainingData
from megatrain.data.feed.validation import num_batches
from megatrain.disk.durable import write_durably
from megatrain.engine.engine import Engine, StepResult
from megatrain.record.ledger import Ledger
from megatrain.record.metrics import MetricsLog, StepRecord
from megatrain.record.run_folder import RunFolder, require_steps_left
from megatrain.record.throughput import Hardware, Work, peak_flops
from megatrain.train.health import Health
from megatrain.train.saving import Saving, report_resume, restore


class Trainer:
    """One run: trains from where its folder stands to ``train.steps``."""

    def __init__(
        self,
        config: ResolvedRun,
        engine: Engine,
        data: TrainingData,
        validation: dict[str, Loader],
        lock: FolderLock | None = None,
    ):
        self.config, self.engine = config, engine
        self.data, self.validation = data, validation
        self.run = RunFolder.of(config)
        self.step = 0
        self.trained_tokens = 0
        self._lock = lock
        self._tokens, self._since = 0, time.perf_counter()
        # context ranks share sequences
        self._work = Work(config.model, engine.mesh.device, counts=engine.mesh.coordinate("cp") == 0)

    def train(self) -> bool:
        """Trains, evaluates, saves. Returns whether the run is complete (a signal may have stopped it).

        Raises:
            CheckpointError: what there is can't be resumed; StorageError: saving failed again and again, or at the end.
            ConfigError: the checkpoint is of a later step than the last.
            DataError: the data can't be read, or end before the run does.
            NonFiniteError: too many steps in a row have no finite gradients, or the last state is not finite.
        """
        resumed = self._begin()
        with StopRequest() as stop, self._metrics() as metrics:
            report_resume(metrics, self.config, resumed)
            if self._is_done(metrics):
                return True
            self._since = time.perf_counter()
            batches = self._loader().batches(self.step, self.config.train.steps)
            with contextlib.closing(batches):
                for batch in batches:
                    result = self.engine.train_step(batch, self.step + 1)
                    self.step += 1
                    self.ledger.add(batch, result.losses)
                    self.health.add(self.step, batch, result)
                    self._work.add(batch)
                    self._log(metrics, result)
                    if self.health.is_at_its_end:
                        self.saving.finish(metrics, self.step)
                        raise self.health.error(self.step, self.saving.newest)
                    if self._is_due(self.config.train.eval_every):
                        self._evaluate(metrics)
                    if self._is_due(self.config.checkpoint.save_every):
                        self._since += self.saving.save(metrics, self.step, self.trained_tokens)
                    saved, told_to_stop = self._on_any_rank(self.saving.has_news, stop.requested)
                    if saved:
                        self.saving.finish(metrics, self.step)
                    if told_to_stop:
                        self._report_stop(metrics, stop)
                        break
            finished = self.step >= self.config.train.steps
            if finished and not self._is_due(self.config.train.eval_every):
                self._evaluate(metrics)
            self.saving.save_at_the_end(metrics, self.step, self.trained_tokens, finished)
        return finished

    def _begin(self) -> Resumed | None:
        """Goes to where the run stands, and readies what its steps need."""
        resumed = restore(self.config, self.engine, self.data)
        if resumed is not None:
            self.step, self.trained_tokens = resumed.step, resumed.tokens
            require_steps_left(self.config, self.step, resumed.path)
        self.data.require_samples(self.config.train.steps)
        if self.engine.mesh.rank == 0:
            write_durably(self.run.data, (json.dumps(self.data.state(self.step), indent=2) + "\n").encode())
        self.ledger = Ledger(self.data, self.engine)
        self.health = Health(self.config, self.engine)
        self.saving = Saving(self.config, self.engine, self.data, self.health, resumed, self._lock)
        return resumed

    def _is_done(self, metrics: Any) -> bool:
        """Whether an earlier start has made all steps; then only evaluations that it did not come to are made up."""
        if self.step < self.config.train.steps:
            return False
        evaluated = [set() if metrics is None else metrics.evaluated(self.step)]
        dist.broadcast_object_list(evaluated, src=0)
        self._evaluate(metrics, evaluated[0])
        if metrics is not None:
            line = f"an earlier start made all {self.step} steps: nothing is left to do. To go on, raise train.steps"
            metrics.log_event("done", self.step, line)
        self.saving.save_at_the_end(metrics, self.step, self.trained_tokens, True)
        return True

    def _report_stop(self, metrics: Any, stop: StopRequest) -> None:
        if metrics is not None:
            who = stop.reason.name if stop.reason is not None else "another rank"
            line = f"stopping after step {self.step}, as {who} asks"
            metrics.log_event("stop", self.step, line, reason=who)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, metrics: Any, result: StepResult) -> None:
        self._tokens += result.tokens
        self.trained_tokens += result.tokens
        if self.step % self.config.train.log_every and self.step not in (1, self.config.train.steps):
            return
        loss, norm = float(result.loss), float(result.grad_norm)  # waits for the device
        sources, num_skipped = self.ledger.records(self.step), self.health.take_skipped()
        flops = self._work.read(self.engine.over_all_ranks)
        now = time.perf_counter()
        if metrics is not None:
            metrics.log_step(
                StepRecord(
                    step=self.step,
                    loss=loss,
                    grad_norm=norm,
                    lr=result.lr,
                    loss_scale=result.loss_scale,
                    skipped=result.skipped,
                    routing=result.routing.read() if result.routing is not None else {},
                    num_skipped=num_skipped,
                    tokens=self._tokens,
                    flops=flops,
                    seconds=now - self._since,
                )
            )
            metrics.log_sources(self.step, sources)
        self._tokens, self._since = 0, now

    def _evaluate(self, metrics: Any, but: Collection[str] = ()) -> None:
        """Mean loss over the first ``eval_batches`` batches of each validation set, ``but`` some."""
        start = time.perf_counter()
        for name, loader in self.validation.items():
            if name in but:
                continue
            batches = range(min(self.config.train.eval_batches, num_batches(loader)))
            results = [self.engine.evaluate(loader.batch(i)) for i in batches]
            loss = sum(float(total) for total, _ in results) / sum(count for _, count in results)
            if metrics is not None:
                metrics.log_evaluation(self.step, loss, name)
        self._since += time.perf_counter() - start  # evaluation is not training time

    def _loader(self) -> Loader:
        mesh = self.engine.mesh
        return self.data.loader(mesh.coordinate("dp"), mesh.topology.dp, pin=mesh.device.type == "cuda")

    def _metrics(self) -> Any:
        if self.engine.mesh.rank != 0:
            return contextlib.nullcontext()
        config, device = self.config, self.engine.mesh.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        peak = peak_flops(name, config.precision.dtype, config.train.peak_tflops)
        return MetricsLog(
            self.run,
            config.train.steps,
            Hardware(dist.get_world_size(), peak),
            resumed_step=self.step,
            write_line=lambda line: print(line, flush=True),
        )

    def _on_any_rank(self, *flags: bool) -> list[bool]:
        """Which of ``flags`` any rank has raised: all ranks do the same after the same step."""
        raised = torch.tensor(flags, dtype=torch.int32, device=self.engine.mesh.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]
