"""One step and one evaluation of a run, to see that it can be had: nothing is written."""

import resource
from pathlib import Path

import torch
import torch.distributed as dist

from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.loader import Loader
from megatrain.data.feed.training import TrainingData
from megatrain.engine.engine import Engine
from megatrain.train.saving import restore

_GIB = 2.0**30


def dry_run(config: ResolvedRun, engine: Engine, data: TrainingData, validation: dict[str, Loader]) -> None:
    """Loads what the run would go on from, makes its next step, evaluates one batch of each set, and prints it all.

    Raises:
        CheckpointError, ConfigError, DataError: as the run would.
    """
    resumed = restore(config, engine, data)
    step = 0 if resumed is None else resumed.step
    if resumed is not None:
        _say(engine, f"loads {resumed.path} at step {step}", *resumed.report)
    data.require_samples(config.train.steps)
    mesh = engine.mesh
    loader = data.loader(mesh.coordinate("dp"), mesh.topology.dp, pin=mesh.device.type == "cuda")
    result = engine.train_step(loader.batch(step), step + 1)
    loss, norm = float(result.loss), float(result.grad_norm)
    _say(engine, f"step {step + 1} | loss {loss:.4f} | grad norm {norm:.3f} | {result.tokens} tokens")
    for name, batches in validation.items():
        total, count = engine.evaluate(batches.batch(0))
        _say(engine, f"evaluation of {name} | loss {float(total) / count:.4f}")
    _say(engine, _memory(engine), f"dry run: nothing was written to {Path(config.folder) / config.name}")


def _memory(engine: Engine) -> str:
    """The most that any rank has taken so far: of its GPU's memory, else of its host's."""
    device = engine.mesh.device
    on_gpu = device.type == "cuda"
    own = (
        torch.cuda.max_memory_allocated(device) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    most = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    place = "GPU memory" if on_gpu else "host memory (all that the process holds)"
    return f"the largest rank has taken {int(most) / _GIB:.2f} GiB of {place}"


def _say(engine: Engine, *lines: str) -> None:
    if engine.mesh.rank == 0:
        for line in lines:
            print(line, flush=True)
