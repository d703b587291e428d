"""Makes a lost or damaged manifest again, from the headers of the arrays and the CRC behind each chunk."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError, UnfitError, explained
from megatrain.checkpoint.store.folder import MANIFEST
from megatrain.checkpoint.store.manifest import (
    HEADER,
    MAX_HEADER_BYTES,
    TENSORS,
    ArraySpec,
    Manifest,
    StoredArray,
    chunk_file,
    crc_hex,
)
from megatrain.checkpoint.store.tree import Tree
from megatrain.disk.durable import write_durably


def rebuild_manifest(path: Path, progress: Callable[[int], object] = lambda num_bytes: None) -> Manifest:
    """Reads every chunk of ``path`` and writes its ``manifest.json``; the old one, if any, stays beside it.

    Without the manifest only accidents inside a chunk can be told, not a whole chunk of another step or run.

    Raises:
        CheckpointError: a header or a chunk is missing or damaged, or they are of different saves, or the manifest is
            whole and says more than a new one could; nothing is written.
    """
    _require_lost(path)
    tree = Tree(path)
    root = Path(tree.root)
    top, top_crc = _header(tree, TENSORS)
    try:
        said = top["attributes"]
        step, run_id, versions, state = (said[field] for field in ("step", "run_id", "versions", "state"))
        names = [(kind, name) for kind, name in (entry.split("/") for entry in said["arrays"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{root / TENSORS / HEADER} does not tell the state of the checkpoint") from error
    groups, arrays = {"": top_crc}, {}
    for kind, name in names:
        if kind not in groups:
            _, groups[kind] = _header(tree, f"{TENSORS}/{kind}")
        array = _array(tree, kind, name, (step, run_id), progress)
        arrays[array.spec.key] = array
    manifest = Manifest(step, run_id, versions, state, groups, dict(sorted(arrays.items())))
    content = manifest.to_bytes()
    Manifest.from_bytes(content)
    with explained(f"write {root / MANIFEST}"):
        if os.path.lexists(root / MANIFEST):
            os.rename(root / MANIFEST, _free_name(root / f"{MANIFEST}.replaced"))
        write_durably(root / MANIFEST, content)
    return manifest


def _require_lost(path: Path) -> None:
    with explained(f"look at {path}"):
        if not path.is_dir():
            raise CheckpointError(f"{path} is not the folder of a checkpoint")
        if not os.path.lexists(path / MANIFEST):
            return
    try:
        CheckpointReader(path)
    except UnfitError:
        raise  # of a newer version: whole, too
    except CheckpointError:
        return
    raise CheckpointError(f"{path / MANIFEST} is whole: nothing to rebuild; `verify` finds damage of other files")


def _free_name(path: Path) -> Path:
    """``path``, or it with the first number that makes it another name than those in use."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _array(tree: Tree, kind: str, name: str, save: tuple[int, str], progress: Callable[[int], object]) -> StoredArray:
    header, crc = _header(tree, f"{TENSORS}/{kind}/{name}")
    try:
        grid = header["chunk_grid"]["configuration"]["chunk_shape"]
        spec = ArraySpec(kind, name, header["data_type"], tuple(header["shape"]), tuple(grid))
        of = header["attributes"]["step"], header["attributes"]["run_id"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{kind} of {name}: its {HEADER} is not one of ours: {error!r}") from error
    if of not in (save, (save[0], "")):  # earlier versions told the run's id to rank 0 alone
        raise CheckpointError(
            f"{spec.label} is of step {of[0]}, run {of[1]}; the checkpoint of step {save[0]}, {save[1]}"
        )
    array = StoredArray(spec, {}, crc)
    for index in spec.indices():
        file = chunk_file(index)
        tree.require([(spec, [index])])  # one by one, as the grid may claim to be endless
        array.chunks[file] = tree.read_chunk(spec, file, (), None)
        progress(spec.file_bytes)
    return array


def _header(tree: Tree, folder: str) -> tuple[dict[str, Any], str]:
    relative = f"{folder}/{HEADER}"
    with explained(f"read {tree.root}/{relative}"):
        data = tree.content(relative, MAX_HEADER_BYTES)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{tree.root}/{relative} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{tree.root}/{relative} is damaged: not an object")
    return content, crc_hex(data)
