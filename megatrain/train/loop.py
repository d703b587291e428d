"""The training loop: steps, and what hangs on them."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatrain.checkpoint.errors import StorageError, UnfitError
from megatrain.checkpoint.folder import step_of
from megatrain.checkpoint.lock import FolderLock
from megatrain.checkpoint.resume import Resumed, resume
from megatrain.checkpoint.retention import Retention
from megatrain.checkpoint.save import Outcome, Saver
from megatrain.checkpoint.tokenizer_file import tokenizer_to_carry
from megatrain.config.derive import flops_per_token
from megatrain.config.schema import RunConfig
from megatrain.data.errors import DataError
from megatrain.data.loader import Loader
from megatrain.data.training import TrainingData
from megatrain.data.validation import num_batches
from megatrain.disk.durable import write_durably
from megatrain.engine.engine import Engine, StepResult
from megatrain.train.ledger import Ledger
from megatrain.train.metrics import MetricsLog, StepRecord
from megatrain.train.run_folder import RunFolder, other_versions, versions
from megatrain.train.signals import StopRequest
from megatrain.train.throughput import Hardware, peak_flops


class Trainer:
    """One run: trains from where its folder stands to ``train.steps``."""

    def __init__(
        self,
        config: RunConfig,
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
        self._saved_step: int | None = None
        self._failed_saves = 0

    def train(self) -> bool:
        """Trains, evaluates, saves. Returns whether the run is complete (a signal may have stopped it).

        Raises:
            CheckpointError: what there is can't be resumed; StorageError: saving failed again and again, or at the end.
            DataError: the data can't be read, or end before the run does.
        """
        resumed = self._resume()
        self.data.require_samples(self.config.train.steps)
        if self.engine.mesh.rank == 0:
            write_durably(self.run.data, (json.dumps(self.data.state(self.step), indent=2) + "\n").encode())
        self.ledger = Ledger(self.data, self.engine)
        self._saver = self._make_saver(resumed)
        with StopRequest() as stop, self._metrics() as metrics:
            self._report_resume(metrics, resumed)
            self._since = time.perf_counter()
            batches = self._loader().batches(self.step, self.config.train.steps)
            with contextlib.closing(batches):
                for batch in batches:
                    result = self.engine.train_step(batch, self.step + 1)
                    self.step += 1
                    self.ledger.add(batch, result.losses)
                    self._log(metrics, result)
                    if self._is_due(self.config.train.eval_every):
                        self._evaluate(metrics)
                    if self._is_due(self.config.checkpoint.save_every):
                        self._save(metrics)
                    saved, told_to_stop = self._on_any_rank(self._saver.has_news, stop.requested)
                    if saved:
                        self._finish_save(metrics)
                    if told_to_stop:
                        self._report_stop(metrics, stop)
                        break
            finished = self.step >= self.config.train.steps
            if finished and not self._is_due(self.config.train.eval_every):
                self._evaluate(metrics)
            self._save_at_the_end(metrics)
        return finished

    def _resume(self) -> Resumed | None:
        checkpoint = self.config.checkpoint
        load = None if checkpoint.load is None else Path(checkpoint.load)
        resumed = resume(self.engine, self.run.checkpoints, self._resume_data, checkpoint.resume, load)
        if resumed is not None:
            self.step = self._saved_step = resumed.state["step"]
            self.trained_tokens = resumed.state["tokens"]
        return resumed

    def _report_resume(self, metrics: Any, resumed: Resumed | None) -> None:
        if metrics is None or resumed is None:
            return
        for path, problem in resumed.skipped:
            line = f"WARNING: skipped a damaged checkpoint: {problem}. The newest good one is of step {self.step}"
            metrics.log_event("damaged", self.step, line, path=str(path), problem=problem, newest_good_step=self.step)
        line, others = f"resumed from {resumed.path} at step {self.step}", other_versions(resumed.versions)
        if others:
            line += f"; saved by other versions: {', '.join(others)}"
        metrics.log_event("resume", self.step, line, path=str(resumed.path), other_versions=others)

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
        sources = self.ledger.records(self.step)
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
                    tokens=self._tokens,
                    seconds=now - self._since,
                )
            )
            metrics.log_sources(self.step, sources)
        self._tokens, self._since = 0, now

    def _evaluate(self, metrics: Any) -> None:
        """Mean loss and perplexity over the first ``eval_batches`` batches of each validation set."""
        start = time.perf_counter()
        for name, loader in self.validation.items():
            batches = range(min(self.config.train.eval_batches, num_batches(loader)))
            results = [self.engine.evaluate(loader.batch(i)) for i in batches]
            loss = sum(float(total) for total, _ in results) / sum(count for _, count in results)
            if metrics is not None:
                metrics.log_evaluation(self.step, loss, math.exp(loss), name)
        self._since += time.perf_counter() - start  # evaluation is not training time

    def _make_saver(self, resumed: Resumed | None) -> Saver:
        checkpoint = self.config.checkpoint
        skipped = resumed.skipped if resumed is not None else ()
        first = self.engine.mesh.rank == 0
        tokenizer, reason = tokenizer_to_carry(*self.data.tokenizer_file()) if first else (None, "")
        if reason:
            print(f"checkpoints carry no tokenizer: {reason}", flush=True)
        self._versions = {name: text for name, text in versions().items() if text} if first else {}
        return Saver(
            self.engine,
            self.run.checkpoints,
            self.run.run_id if first else "",
            background=checkpoint.background,
            retention=Retention(checkpoint.keep_last, checkpoint.keep_every),
            lock=self._lock,
            damaged=frozenset(step for path, _ in skipped if (step := step_of(path.name)) is not None),
            tokenizer=tokenizer,
        )

    def _save(self, metrics: Any) -> None:
        """Begins a save; the one before ends first."""
        start = time.perf_counter()
        self._finish_save(metrics)
        state = {
            "data": self.data.state(self.step),
            "tokens": self.trained_tokens,
            "tokenizers": self.data.tokenizers(),
        }
        self._saver.begin(self.step, state, self._versions)
        self._saved_step = self.step
        if not self.config.checkpoint.background:
            self._finish_save(metrics)
        self._since += time.perf_counter() - start  # saving is not training time

    def _finish_save(self, metrics: Any) -> None:
        """Waits for the save in flight, if there is one, and reports it. A run survives some failures."""
        outcome = self._saver.finish()
        if outcome is None:
            return
        if metrics is not None:
            _report_save(metrics, self.step, outcome)
        self._failed_saves = self._failed_saves + 1 if outcome.problem else 0
        if outcome.problem and self._saved_step == outcome.step:
            self._saved_step = None
        if self._failed_saves >= self.config.checkpoint.max_failures:
            raise StorageError(
                f"{self._failed_saves} checkpoints in a row were not saved, the last one of step {outcome.step}: "
                f"{outcome.problem}. The run ends here; older checkpoints are whole"
            )

    def _save_at_the_end(self, metrics: Any) -> None:
        self._finish_save(metrics)
        if self._saved_step != self.step:
            self._save(metrics)
            self._finish_save(metrics)
        if self._failed_saves:
            raise StorageError(f"step {self.step}, the last of this start, was not saved; the reason stands above")

    def _resume_data(self, saved: dict[str, Any], step: int) -> None:
        try:
            self.data.resume(saved, step)
        except DataError as error:
            raise UnfitError(str(error)) from error

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
            flops_per_token(config.model, config.data.seq_len),
            Hardware(dist.get_world_size(), peak),
            resumed_step=self.step,
            write_line=lambda line: print(line, flush=True),
        )

    def _on_any_rank(self, *flags: bool) -> list[bool]:
        """Which of ``flags`` any rank has raised: all ranks do the same after the same step."""
        raised = torch.tensor(flags, dtype=torch.int32, device=self.engine.mesh.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]


def _report_save(metrics: Any, step: int, outcome: Outcome) -> None:
    for note in outcome.notes:
        metrics.log_event("checkpoint_note", step, f"checkpoint: {note}", note=note)
    line = f"saved {outcome.path} in {outcome.seconds:.1f} s ({outcome.stall_seconds:.2f} s of them stood still)"
    if outcome.problem:
        line = f"WARNING: checkpoint of step {outcome.step} not saved, training goes on: {outcome.problem}"
    fields = {"seconds": outcome.seconds, "stall_seconds": outcome.stall_seconds, "num_bytes": outcome.num_bytes}
    failed = outcome.problem is not None
    metrics.log_event(
        "checkpoint", step, line, saved_step=outcome.step, failed=failed, problem=outcome.problem, **fields
    )
