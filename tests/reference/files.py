"""Reads what a run left behind, by the pages on formats alone: checkpoints, metrics, token shards."""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

_TYPES = {4: "<i4", 8: "<u2"}  # docs/data_format.md, `.idx`


@dataclass(frozen=True)
class Corpus:
    """A data set. ``stream`` [T]: all tokens; ``lengths``: of the documents, in order; ``digest`` names the content."""

    stream: np.ndarray
    lengths: list[int]
    eod: int
    digest: str


def read_corpus(folder: Path) -> Corpus:
    """docs/data_format.md: the manifest's shards in order, each document one sequence of the index."""
    manifest = json.loads((folder / "manifest.json").read_text())
    parts, lengths, digests = [], [], []
    for shard in manifest["shards"]:
        index = (folder / f"{shard['name']}.idx").read_bytes()
        kind, count = struct.unpack_from("<BQ", index, 17)
        lengths += np.frombuffer(index, "<i4", count, 34).tolist()
        content = (folder / f"{shard['name']}.bin").read_bytes()
        parts.append(np.frombuffer(content, _TYPES[kind]).astype(np.int64))
        digests += [hashlib.sha256(content).hexdigest(), hashlib.sha256(index).hexdigest()]
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Corpus(np.concatenate(parts), lengths, manifest["eod_id"], digest)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """docs/checkpoint.md: the manifest's state, and FP32 arrays by kind and name."""
    arrays: dict[str, dict[str, Tensor]] = {}
    for header in folder.glob("tensors/*/*/zarr.json"):
        spec = json.loads(header.read_text())
        chunk = spec["chunk_grid"]["configuration"]["chunk_shape"]
        whole = np.full([-(-n // c) * c for n, c in zip(spec["shape"], chunk, strict=True)], np.nan, np.float32)
        for file in header.parent.glob("c*"):
            place = [int(part) for part in file.name.split(".")[1:]]
            corner = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))
            whole[corner] = np.frombuffer(file.read_bytes()[:-4], "<f4").reshape(chunk)
        own = whole[tuple(slice(n) for n in spec["shape"])]
        assert not np.isnan(own).any(), f"{header.parent} lacks a chunk"
        arrays.setdefault(header.parent.parent.name, {})[header.parent.name] = torch.from_numpy(own.copy())
    return json.loads((folder / "manifest.json").read_text())["state"], arrays


def dotted(sections: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as docs/config.md names their keys: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def read_config(run: Path) -> dict[str, Any]:
    """The resolved config of a run. YAML 1.2 has numbers like 1e-05, which PyYAML takes for text."""

    def numbers(value: Any) -> Any:
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            return (
                type(value)(dict(made).values() if isinstance(value, list) else made)
                if (made := [(k, numbers(v)) for k, v in pairs])
                else value
            )
        return (
            float(value)
            if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?e[-+]?[0-9]+", value)
            else value
        )

    return numbers(yaml.safe_load((run / "config.yaml").read_text()))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
