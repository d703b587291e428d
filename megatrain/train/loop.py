"""The training loop: steps, and what hangs on them."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatrain.checkpoint.folder import newest_checkpoint
from megatrain.checkpoint.save import load_checkpoint, save_checkpoint
from megatrain.config.derive import flops_per_token
from megatrain.config.schema import RunConfig
from megatrain.data.loader import Loader
from megatrain.engine.engine import Engine, StepResult
from megatrain.train.metrics import MetricsLog, StepRecord
from megatrain.train.run_folder import RunFolder
from megatrain.train.signals import StopRequest
from megatrain.train.throughput import Hardware, peak_flops


class Trainer:
    """One run: trains from where its folder stands to ``train.steps``."""

    def __init__(self, config: RunConfig, engine: Engine, train_data: Loader, validation_data: Loader | None):
        self.config, self.engine = config, engine
        self.train_data, self.validation_data = train_data, validation_data
        self.run = RunFolder.of(config)
        self.step = 0
        self._tokens, self._since = 0, time.perf_counter()
        self._saved_step: int | None = None

    def train(self) -> bool:
        """Trains, evaluates, saves. Returns whether the run is complete (a signal may have stopped it)."""
        self._resume()
        with StopRequest() as stop, self._metrics() as metrics:
            self._since = time.perf_counter()
            batches = self.train_data.batches(self.step, self.config.train.steps)
            with contextlib.closing(batches):
                for batch in batches:
                    result = self.engine.train_step(batch, self.step + 1)
                    self.step += 1
                    self._log(metrics, result)
                    if self._is_due(self.config.train.eval_every):
                        self._evaluate(metrics)
                    if self._is_due(self.config.checkpoint.save_every):
                        self._save()
                    if self._agreed(stop.requested):
                        break
            finished = self.step >= self.config.train.steps
            if finished and not self._is_due(self.config.train.eval_every):
                self._evaluate(metrics)
            self._save()
        return finished

    def _resume(self) -> None:
        checkpoint = newest_checkpoint(self.run.checkpoints)
        if checkpoint is None and self.config.checkpoint.load is not None:
            checkpoint = Path(self.config.checkpoint.load)
        if checkpoint is None:
            return
        state = load_checkpoint(self.engine, checkpoint, self._data_state())
        self.step = self._saved_step = state["step"]
        if self.engine.mesh.rank == 0:
            print(f"resumed from {checkpoint} at step {self.step}", flush=True)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, metrics: Any, result: StepResult) -> None:
        self._tokens += result.tokens
        if self.step % self.config.train.log_every and self.step not in (1, self.config.train.steps):
            return
        loss, norm = float(result.loss), float(result.grad_norm)  # waits for the device
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
                    tokens=self._tokens,
                    seconds=now - self._since,
                )
            )
        self._tokens, self._since = 0, now

    def _evaluate(self, metrics: Any) -> None:
        """Mean loss and perplexity over the first ``eval_batches`` batches of the validation data."""
        if self.validation_data is None:
            return
        start = time.perf_counter()
        num_batches = min(self.config.train.eval_batches, self.validation_data.steps_per_epoch)
        results = [self.engine.evaluate(self.validation_data.batch(i)) for i in range(num_batches)]
        loss = sum(float(total) for total, _ in results) / sum(count for _, count in results)
        if metrics is not None:
            metrics.log_evaluation(self.step, loss, math.exp(loss))
        self._since += time.perf_counter() - start  # evaluation is not training time

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        start = time.perf_counter()
        path = save_checkpoint(self.engine, self.run.checkpoints, self.step, self._run_id(), self._data_state())
        self._saved_step = self.step
        self._since += time.perf_counter() - start
        if self.engine.mesh.rank == 0:
            print(f"saved {path}", flush=True)

    def _data_state(self) -> dict[str, Any]:
        """What fixes the order of the samples; the place in it is the step."""
        return {
            "digest": self.train_data.dataset.digest,
            "seed": self.config.data.seed,
            "seq_len": self.config.data.seq_len,
            "global_batch_size": self.config.train.global_batch_size,
        }

    def _run_id(self) -> str:
        return self.run.run_id if self.engine.mesh.rank == 0 else ""

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

    def _agreed(self, stop: bool) -> bool:
        """Whether any rank was told to stop: all leave the loop after the same step."""
        flag = torch.tensor(int(stop), device=self.engine.mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
