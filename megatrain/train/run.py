"""A whole training run, from a config that the launcher has checked."""

import contextlib
import gc
from collections.abc import Iterator

import torch.distributed as dist

from megatrain.checkpoint.resume import set_aside
from megatrain.checkpoint.store.errors import CheckpointError, StorageError
from megatrain.checkpoint.store.folder import newest_checkpoint, require_free_space, step_of
from megatrain.checkpoint.store.lock import FolderLock
from megatrain.config.reading.problems import ConfigError
from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.training import TrainingData
from megatrain.data.feed.validation import validation_loader, validation_sets
from megatrain.engine.start import start_distributed
from megatrain.record.run_folder import RunFolder, RunFolderError, require_steps_left
from megatrain.spec.counts import num_parameters
from megatrain.spec.derive import num_tokens
from megatrain.train.build import build_engine
from megatrain.train.dry_run import dry_run
from megatrain.train.loop import train


def run(config: ResolvedRun, dry: bool = False) -> bool:
    """Trains a resolved ``config``. Returns whether all steps are done; a signal may have ended it before.

    Args:
        dry: make one step and one evaluation, and write nothing.
    Raises:
        DataError, CheckpointError, RunFolderError: before training where it can be known then.
    """
    assert config.parallel.dp is not None, "resolve the config first"
    training = TrainingData(config, num_tokens(config.model))
    validation = validation_sets(config, num_tokens(config.model))
    device = start_distributed(config.train.deterministic)
    with contextlib.nullcontext() if dry else _claimed_folder(config) as lock:
        engine = build_engine(config, device)
        place = engine.mesh.coordinate("dp"), config.parallel.dp, device.type == "cuda"
        loaders = {name: validation_loader(dataset, config, *place) for name, dataset in validation.items()}
        gc.freeze()  # what stays for the whole run is not looked through in the middle of a step
        gc.enable()
        if dry:
            require_room(RunFolder.of(config), config)
            dry_run(config, engine, training, loaders)
        finished = dry or train(config, engine, training, loaders, lock)
        dist.barrier()
    dist.destroy_process_group()
    return finished


@contextlib.contextmanager
def _claimed_folder(config: ResolvedRun) -> Iterator[FolderLock]:
    """The run folder, ready and this run's alone. Rank 0 acts; a problem that it meets is raised on every rank."""
    run = RunFolder.of(config)
    lock = FolderLock(run.checkpoints)
    problem: list[Exception | None] = [None]
    try:
        if dist.get_rank() == 0:
            try:
                _claim(run, lock, config)
            except (CheckpointError, ConfigError, RunFolderError) as error:
                problem = [error]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise problem[0]
        yield lock
    finally:
        lock.release()


_LEAST_MOMENTS = {"adamw": 2, "cpu_adamw": 2, "lion": 1, "muon": 1, "adafactor": 0}


def require_room(run: RunFolder, config: ResolvedRun) -> None:
    """Refuses to train what can't be saved. Counts FP32 weights and, of each optimizer, the moments that all have.

    Raises:
        StorageError: the disk of the run folder has no room for one checkpoint.
    """
    least = 4 * num_parameters(config.model) * (1 + _LEAST_MOMENTS[config.optimizer.name])
    try:
        require_free_space(run.checkpoints, least)
    except CheckpointError as error:
        raise StorageError(f"{error}. Make room there, or set `folder` to a place on another disk") from error


def _claim(run: RunFolder, lock: FolderLock, config: ResolvedRun) -> None:
    require_room(run, config)
    run.make()
    if config.checkpoint.resume == "auto" and (newest := newest_checkpoint(run.checkpoints)) is not None:
        require_steps_left(config, step_of(newest.name) or 0, newest)
    if (dead := lock.take()) is not None:
        print(f"took {run.checkpoints} over from {dead}, which runs no more", flush=True)
    if config.checkpoint.resume == "restart" and (place := set_aside(run.checkpoints)) is not None:
        print(f"set the checkpoints of {run.checkpoints} aside in {place}", flush=True)
    run.prepare(config)
