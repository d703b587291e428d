"""The checkpoints of a run: where it starts from, and its saves."""

from pathlib import Path
from typing import Any

from megatrain.checkpoint.resume import Resumed, resume
from megatrain.checkpoint.save import Outcome, Saver
from megatrain.checkpoint.store.errors import StorageError, UnfitError
from megatrain.checkpoint.store.folder import step_of
from megatrain.checkpoint.store.lock import FolderLock
from megatrain.checkpoint.store.retention import Retention
from megatrain.checkpoint.store.tokenizer_file import tokenizer_to_carry
from megatrain.config.changes import Change, changes, table
from megatrain.config.schema import ResolvedRun
from megatrain.data.errors import DataError
from megatrain.data.feed.training import TrainingData
from megatrain.engine.engine import Engine
from megatrain.record.metrics import Metrics
from megatrain.record.run_folder import RunFolder, other_versions, require_steps_left, versions
from megatrain.train.health import Health


def restore(config: ResolvedRun, engine: Engine, data: TrainingData) -> Resumed | None:
    """Loads what the run goes on from, and lets ``data`` go on there; None: it starts fresh. Collective.

    Raises:
        CheckpointError: what there is can't be resumed.
        ConfigError: it is of a later step than the last.
    """

    def resume_data(saved: dict[str, Any], step: int) -> None:
        try:
            data.resume(saved, step)
        except DataError as error:
            raise UnfitError(
                f"{error}. Weights go into a run of other data or sequences too: set checkpoint.load and "
                "checkpoint.load_what, in a run folder of its own"
            ) from error

    checkpoint = config.checkpoint
    load = None if checkpoint.load is None else Path(checkpoint.load)
    folder = RunFolder.of(config).checkpoints
    resumed = resume(engine, folder, resume_data, checkpoint.resume, load, checkpoint.load_what)
    if resumed is not None:
        require_steps_left(config, resumed.step, resumed.path)
    return resumed


def report_resume(metrics: Metrics, config: ResolvedRun, resumed: Resumed | None) -> None:
    """Says from where the run goes on, and all that differs from how the checkpoint was made."""
    if resumed is None:
        return
    step = resumed.step
    for path, problem in resumed.skipped:
        line = f"WARNING: skipped a damaged checkpoint: {problem}. The newest good one is of step {step}"
        metrics.log_event("damaged", step, line, path=str(path), problem=problem, newest_good_step=step)
    other, others = _changes(config, resumed), other_versions(resumed.versions)
    lines = [f"resumed from {resumed.path} at step {step}"]
    if resumed.what != "all":
        lines = [f"begins at step 0 with {resumed.what.replace('_', ' ')} of {resumed.path}"]
    if others:
        lines[0] += f"; saved by other versions: {', '.join(others)}"
    lines += [f"    {sentence}" for sentence in resumed.report]
    lines += table(other) if other else ["    its config is the one of this start"]
    told = [
        {"key": change.key, "before": change.before, "now": change.now, "numbers": change.numbers} for change in other
    ]
    metrics.log_event(
        "resume",
        step,
        "\n".join(lines),
        path=str(resumed.path),
        other_versions=others,
        changes=told,
        report=list(resumed.report),
    )


def _changes(config: ResolvedRun, resumed: Resumed) -> list[Change]:
    """A converted checkpoint tells of its model alone."""
    saved = resumed.state.get("config") or {"model": resumed.state["model"]}
    return changes(saved, config)


class Saving:
    """The saves of a run, and what becomes of them. All methods are collective.

    ``newest``: the last checkpoint that is known to be whole: of this run, or the one that it began with.
    """

    def __init__(
        self,
        config: ResolvedRun,
        engine: Engine,
        data: TrainingData,
        health: Health,
        resumed: Resumed | None,
        metrics: Metrics,
        lock: FolderLock | None,
    ):
        self.config, self.data, self.health, self.metrics = config, data, health, metrics
        self.newest = None if resumed is None else resumed.path
        self._saved_step = resumed.step if resumed is not None and resumed.what == "all" else None
        self._withheld_step: int | None = None
        self._failed = 0
        checkpoint, run = config.checkpoint, RunFolder.of(config)
        skipped = resumed.skipped if resumed is not None else ()
        first = engine.mesh.rank == 0
        tokenizer, reason = tokenizer_to_carry(*data.tokenizer_file()) if first else (None, "")
        if reason:
            print(f"checkpoints carry no tokenizer: {reason}", flush=True)
        self._versions = {name: text for name, text in versions().items() if text} if first else {}
        self._saver = Saver(
            engine,
            run.checkpoints,
            run.run_id if first else "",
            background=checkpoint.background,
            retention=Retention(checkpoint.keep_last, checkpoint.keep_every),
            lock=lock,
            damaged=frozenset(step for path, _ in skipped if (step := step_of(path.name)) is not None),
            tokenizer=tokenizer,
        )

    @property
    def has_news(self) -> bool:
        """Whether the save in flight has ended on this rank."""
        return self._saver.has_news

    def save(self, step: int, tokens: int) -> None:
        """Begins a save of the state after ``step``; the one before ends first.

        A state that is not finite is not saved: ``newest`` stays the one to go back to.
        """
        self.finish(step)
        if (problem := self.health.problem_of_saving(step)) is not None:
            line = f"WARNING: checkpoint of step {step} not saved: {problem}"
            self.metrics.log_event("checkpoint", step, line, saved_step=step, failed=True, problem=problem)
            self._withheld_step = step
            return
        state = {"data": self.data.state(step), "tokens": tokens, "tokenizers": self.data.tokenizers()}
        self._saver.begin(step, state, self._versions)
        self._saved_step = step
        if not self.config.checkpoint.background:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Waits for the save in flight, if there is one, and reports it at ``step``. A run survives some failures.

        Raises:
            StorageError: so many failed one after the other that the run ends.
        """
        outcome = self._saver.finish()
        if outcome is None:
            return
        _report_save(self.metrics, step, outcome)
        self._failed = self._failed + 1 if outcome.problem else 0
        if not outcome.problem:
            self.newest = outcome.path
        elif self._saved_step == outcome.step:
            self._saved_step = None
        if self._failed >= self.config.checkpoint.max_failures:
            raise StorageError(
                f"{self._failed} checkpoints in a row were not saved, the last one of step {outcome.step}: "
                f"{outcome.problem}. The run ends here; older checkpoints are whole"
            )

    def save_at_the_end(self, step: int, tokens: int, finished: bool) -> None:
        """Saves the last state, unless it stands on disk.

        Raises:
            StorageError: it was not saved; NonFiniteError: it is not finite, and the run is ``finished``.
        """
        self.finish(step)
        if step not in (self._saved_step, self._withheld_step):
            self.save(step, tokens)
            self.finish(step)
        if self._failed:
            raise StorageError(f"step {step}, the last of this start, was not saved; the reason stands above")
        if self._withheld_step == step and finished:  # a run that was told to stop goes on from the one before
            raise self.health.error(step, self.newest)


def _report_save(metrics: Metrics, step: int, outcome: Outcome) -> None:
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
