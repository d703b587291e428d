"""Things that can stand where a file or a folder of a checkpoint should, and a small whole model to put them into."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatrain.checkpoint.store.arrays import CheckpointWriter
from megatrain.models.build import build_empty_model
from tests.configs import model_spec

SPARSE = 2**38  # bytes
MODEL = model_spec(
    {"num_layers": 1, "hidden_size": 8, "attention.num_heads": 2, "attention.num_kv_heads": 1}
    | {"feed_forward.hidden_size": 8, "vocab_size": 16, "max_seq_len": 8}
)


def model_state(step: int) -> dict:
    """What a run stores beside its tensors."""
    return {
        "step": step,
        "optimizer_steps": step,
        "dtype": "fp32",
        "loss_scaler": {},
        "router_biases": {},
        "seeds": {},
        "data": {},
        "tokens": 64 * step,
        "model": MODEL.model_dump(mode="json"),
    }


def save_run(folder: Path, steps: tuple[int, ...] = (1, 2), state: dict | None = None) -> Path:
    """A run whose checkpoints hold a whole model; returns its newest checkpoint."""
    with torch.device("meta"):
        shapes = {name: tuple(part.shape) for name, part in build_empty_model(MODEL).named_parameters()}
    for step in steps:
        writer = CheckpointWriter(folder / "checkpoints", step, "run-a")
        writer.prepare()
        for number, (name, shape) in enumerate(shapes.items()):
            part = np.full(shape, step + number, np.float32)
            writer.write("weight", name, part, offset=(0,) * len(shape), full_shape=shape)
        path = writer.commit(writer.records(), state or model_state(step), {"megatrain": "0.1.0"})
        writer.close()
    return path


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name must be short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, SPARSE)


def _moved_away(path: Path) -> None:
    """A link to what stood there."""
    os.rename(path.with_name(f"{path.name}.moved"), path.parents[len(path.parts) - 4] / f"elsewhere-{path.name}")


ODD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": os.mkdir,
    "full_folder": lambda path: (path.mkdir(), (path / "x").touch()),
    "empty": lambda path: path.touch(),
    "garbage": lambda path: path.write_bytes(b"\x80\x04\xff" * 20),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "sparse": _sparse,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
    "socket": _socket,
    "unreadable": lambda path: (path.mkdir(), path.chmod(0)),
}


def put(kind: str, path: Path) -> None:
    """Puts something else where ``path`` is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    ODD[kind](path)
