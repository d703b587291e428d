"""Saving and loading against plain files and against other formats, the same bytes, in turns.

    python -m benchmarks.checkpoint                      about 250 MB of state on one process
    python -m benchmarks.checkpoint --reshard            two processes: a load in another layout against the same one

Every candidate writes FP32 weights and both moments and waits for the disk (those that don't by themselves get an
``fsync`` of each file). Before each save, outside its time, the last one of the candidate is deleted and the disk comes
to rest. Loads come from the page cache, then from the disk. Ours are verified and end with the weights of the step set
from the FP32 ones, as DeepSpeed's do; ``plain, carried over`` is the plain file with that copy behind it.
"""

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from benchmarks.paired import describe_machine, interleaved, median_ratio, random_batch
from megatrain.checkpoint.load import load_checkpoint
from megatrain.checkpoint.save import Saver
from megatrain.config.load import load_config
from megatrain.engine.engine import Engine
from megatrain.engine.start import start_distributed
from megatrain.engine.state import finish_import, local_fragments
from megatrain.spec.kinds import KINDS
from megatrain.train.build import build_engine

Tensors = dict[str, torch.Tensor]


def config_of(hidden_size: int, world_size: int, *overrides: str) -> Any:
    shape = [
        f"--model.hidden_size={hidden_size}",
        "--model.attention.num_heads=8",
        "--model.num_layers=6",
        "--data.seq_len=64",
    ]
    rest = ["--precision.dtype=fp32", "--train.global_batch_size=2", "--schedule.name=constant"]
    return load_config([], [*shape, *rest, *overrides], world_size).with_derived(world_size).config


def state_of(engine: Engine) -> Tensors:
    """Every weight and moment, as views of the live state."""
    fragments = local_fragments(engine)
    return {f"{kind}.{f.name}": f.values(kind).view(f.shape) for kind in KINDS for f in fragments}


def sync_files(folder: Path) -> None:
    """Waits for the disk, as ours does."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class Formats:
    """One method to save and one to load for each format; all write below ``folder``.

    ``deepspeed``: an engine of DeepSpeed's with as much state.
    """

    def __init__(self, engine: Engine, deepspeed: Any, folder: Path):
        self.engine, self.deepspeed, self.folder, self.state = engine, deepspeed, folder, state_of(engine)
        self.saver = Saver(engine, folder / "megatrain", "benchmark", background=False)
        self.target = {name: torch.empty_like(tensor) for name, tensor in self.state.items()}

    def save_plain(self) -> None:
        with open(self._fresh("plain") / "data", "wb", buffering=0) as file:
            for tensor in self.state.values():
                file.write(tensor.numpy().data)
            os.fsync(file.fileno())

    def load_plain(self) -> None:
        with open(self.folder / "plain/data", "rb", buffering=0) as file:
            for tensor in self.target.values():
                file.readinto(tensor.numpy().data)

    def load_plain_carried_over(self) -> None:
        self.load_plain()
        finish_import(self.engine)

    def save_megatrain(self) -> None:
        self.saver.begin(1, {"data": {}, "tokens": 0}, {})
        outcome = self.saver.finish()
        assert outcome is not None and outcome.problem is None, outcome

    def load_megatrain(self) -> None:
        load_checkpoint(self.engine, self.folder / "megatrain/step-00000001", lambda data, step: None)

    def save_torch(self) -> None:
        torch.save(self.state, self._fresh("torch.save") / "data.pt")
        sync_files(self.folder / "torch.save")

    def load_torch(self) -> None:
        torch.load(self.folder / "torch.save/data.pt", weights_only=True)

    def save_safetensors(self) -> None:
        from safetensors.torch import save_file

        save_file(self.state, self._fresh("safetensors") / "data.safetensors")
        sync_files(self.folder / "safetensors")

    def load_safetensors(self) -> None:
        from safetensors.torch import load_file

        for name, tensor in load_file(self.folder / "safetensors/data.safetensors").items():
            self.target[name].copy_(tensor)  # it maps the file: nothing is read before

    def save_dcp(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(self.state), checkpoint_id=self._fresh("DCP"))  # syncs by itself

    def load_dcp(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(self.target), checkpoint_id=self.folder / "DCP")

    def save_deepspeed(self) -> None:
        self.deepspeed.save_checkpoint(str(self._fresh("DeepSpeed")), tag="one")
        sync_files(self.folder / "DeepSpeed")

    def load_deepspeed(self) -> None:
        self.deepspeed.load_checkpoint(str(self.folder / "DeepSpeed"), tag="one")

    def _fresh(self, name: str) -> Path:
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def clean(self, name: str) -> None:
        """Removes what the candidate ``name`` saved and lets the disk come to rest."""
        shutil.rmtree(self.folder / NAMES[name][1], ignore_errors=True)
        os.sync()

    def forget(self, name: str) -> None:
        """Takes what the candidate ``name`` saved out of the page cache."""
        for path in (self.folder / NAMES.get(name, NAMES["plain file"])[1]).rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


NAMES = {
    "plain file": ("plain", "plain"),
    "megatrain": ("megatrain", "megatrain"),
    "torch.save": ("torch", "torch.save"),
    "safetensors": ("safetensors", "safetensors"),
    "torch DCP": ("dcp", "DCP"),
    "DeepSpeed": ("deepspeed", "DeepSpeed"),
}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes of memory that this process took at most beyond what it had; looked at every two milliseconds."""
    gc.collect()
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def report(title: str, seconds: dict[str, list[float]], num_bytes: int) -> None:
    print(title)
    for name, measured in seconds.items():
        median = statistics.median(measured)
        speed = median_ratio(seconds["plain file"], measured)
        rate = f"{num_bytes / median / 1e6:7.0f} MB/s"
        print(f"  {name:<19} {median:7.3f} s  {rate}  {speed:5.2f} of the plain file's speed")


def measure_formats(hidden_size: int, repeats: int, folder: Path) -> None:
    device = start_distributed()
    config = config_of(hidden_size, 1)
    engine = build_engine(config, device)
    engine.train_step(random_batch(config, device), 1)
    other: Any = build_engine(config_of(hidden_size, 1, "--parallel.zero_stage=2"), device)
    other.train_step(random_batch(config, device), 1)
    formats = Formats(engine, other.runtime.deepspeed, folder)
    num_bytes = sum(tensor.nbytes for tensor in formats.state.values())
    print(describe_machine("torch", "deepspeed", "safetensors", "zarr"))
    print(f"{num_bytes / 1e6:.0f} MB in {len(formats.state)} tensors, {repeats} repeats, medians")
    saves = {name: getattr(formats, f"save_{method}") for name, (method, _) in NAMES.items()}
    loads = {name: getattr(formats, f"load_{method}") for name, (method, _) in NAMES.items()}
    interleaved(saves, 1, before=formats.clean)
    report("save", interleaved(saves, repeats, time.perf_counter, formats.clean), num_bytes)
    loads["plain, carried over"] = formats.load_plain_carried_over
    interleaved(loads, 1)
    report("load from the page cache", interleaved(loads, repeats, time.perf_counter), num_bytes)
    report("load from the disk", interleaved(loads, repeats, time.perf_counter, formats.forget), num_bytes)
    for name, (_, place) in NAMES.items():
        files = [path for path in (folder / place).rglob("*") if path.is_file()]
        peaks = []
        formats.clean(name)
        for action in (saves[name], loads[name]):
            with peak_memory() as peak:
                action()
            peaks.append(peak[0] / 1e6)
        size = sum(path.stat().st_size for path in files) / 1e6
        memory = f"memory: save {peaks[0]:5.0f} MB, load {peaks[1]:5.0f} MB"
        print(f"  {name:<12} {len(files):4} files, {size:6.0f} MB; {memory}")
    measure_stall(engine, formats, repeats)


def measure_stall(engine: Engine, formats: Formats, repeats: int) -> None:
    """How long training stands still for a save in the background, against a copy of the same bytes."""
    saver = Saver(engine, formats.folder / "background", "benchmark")
    buffer = torch.zeros(sum(tensor.numel() for tensor in formats.state.values()))

    def bare_copy() -> None:
        place = 0
        for tensor in formats.state.values():
            buffer[place : place + tensor.numel()].copy_(tensor.flatten())
            place += tensor.numel()

    stalls: list[float] = []
    copies: list[float] = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        bare_copy()
        copied = time.perf_counter()
        saver.begin(1, {"data": {}, "tokens": 0}, {})
        stalled = time.perf_counter()
        saver.finish()
        if repeat:  # the first one takes the memory
            copies.append(copied - start)
            stalls.append(stalled - copied)
    ratio = median_ratio(stalls, copies)
    print(f"stall {statistics.median(stalls):.4f} s, bare copy {statistics.median(copies):.4f} s, ratio {ratio:.2f}")


LAYOUTS = {"dp 2, ZeRO 1": ["--parallel.zero_stage=1"], "tp 2": ["--parallel.tp=2", "--parallel.zero_stage=0"]}


def rank_main(rank: int, action: str, layout: str, hidden_size: int, repeats: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = "29531"
    device = start_distributed()
    torch.set_num_threads(1)
    config = config_of(hidden_size, 2, *LAYOUTS[layout])
    engine = build_engine(config, device)
    places = {name: Path(folder) / name.replace(" ", "-") for name in LAYOUTS}
    if action == "save":
        engine.train_step(random_batch(config, device), 1)
        saver = Saver(engine, places[layout], "benchmark", background=False)
        saver.begin(1, {"data": {}, "tokens": 0}, {})
        outcome = saver.finish()
        assert outcome is not None and outcome.problem is None, outcome
    else:

        def load(place: Path) -> None:
            load_checkpoint(engine, place / "step-00000001", lambda data, step: None)
            dist.barrier()

        candidates: dict[str, Callable[[], object]] = {name: partial(load, place) for name, place in places.items()}
        interleaved(candidates, 1)
        seconds = interleaved(candidates, repeats, time.perf_counter)
        (other,) = set(LAYOUTS) - {layout}
        if rank == 0:
            ratio = median_ratio(seconds[other], seconds[layout])
            print(
                f"loaded into {layout}: saved there {statistics.median(seconds[layout]):.3f} s, "
                f"saved in {other} {statistics.median(seconds[other]):.3f} s, ratio {ratio:.2f}",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


def measure_resharding(hidden_size: int, repeats: int, folder: Path) -> None:
    for action in ("save", "load"):
        for layout in LAYOUTS:
            arguments = (action, layout, hidden_size, repeats, str(folder))
            torch.multiprocessing.spawn(rank_main, arguments, nprocs=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=448, help="width of the model (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--reshard", action="store_true", help="two ranks: loads in another layout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure = measure_resharding if options.reshard else measure_formats
        measure(options.hidden_size, options.repeats, Path(folder))


if __name__ == "__main__":
    main()
