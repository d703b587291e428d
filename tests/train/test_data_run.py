"""A whole run over three real sources: in any layout, over a change of weights and a resume, as in one process."""

import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.config.schema import RunConfig
from tests.data.factory import byte_tokenizer, write_documents
from tests.layouts import Layout, build_engine, run_config
from tests.pool import Pool

SEQ, BATCH = 16, 8
PACKAGES = ("json", "logging", "email")  # of the standard library: a source each


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data sets of the packages' files, a document each."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().decode())
    library, found = Path(sysconfig.get_path("stdlib")), {}
    for package in PACKAGES:
        texts = [path.read_text(encoding="utf-8")[:300] for path in sorted((library / package).glob("*.py"))]
        documents = [np.array([*tokenizer.encode(text).ids, 0]) for text in texts if text]
        found[package] = str(write_documents(tmp_path_factory.mktemp("sources") / package, documents, 257))
    return found


def config_of(
    folder: Path, sources: dict[str, str], layout: Layout, steps: int, weights: tuple[str, ...], **train: Any
) -> RunConfig:
    sizes = {"global_batch_size": BATCH, "micro_batch_size": 1, "steps": steps, "log_every": 1, **train}
    data = {
        "train": {
            name: {"path": path, "weight": weight}
            for (name, path), weight in zip(sources.items(), weights, strict=True)
        },
        "validation": {"small": sources["json"], "large": sources["email"]},
        "sequences": "mask_documents",
        "seq_len": SEQ,
    }
    model = {"vocab_size": 258, "num_layers": 2}
    config = run_config("llama", layout, model=model, train={**sizes, "eval_batches": 2}, data=data)
    return config.model_copy(update={"folder": str(folder)})


def run_steps(config: RunConfig) -> None:
    """What train/run.py does, in the test pool's world."""
    import torch.distributed as dist

    from megatrain.data.feed.training import TrainingData
    from megatrain.data.feed.validation import validation_loader, validation_sets
    from megatrain.record.run_folder import RunFolder
    from megatrain.train.loop import train

    if dist.get_rank() == 0:
        RunFolder.of(config).prepare(config)
    dist.barrier()
    engine = build_engine(config)
    place = engine.mesh.coordinate("dp"), engine.mesh.topology.dp
    loaders = {name: validation_loader(d, config, *place) for name, d in validation_sets(config, 258).items()}
    try:
        train(config, engine, TrainingData(config, 258), loaders)
    finally:
        engine.close()


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_three_sources_in_two_layouts_equal_one_process(pool: Pool, tmp_path: Path, sources: dict[str, str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    ramp = {"ramp": [{"until_step": 2, "global_batch_size": 8, "seq_len": 8}]}
    starts = [
        (Layout(pp=2, dp=2, zero_stage=1), 3, ("1", "1/2", "0.3")),
        (Layout(tp=2, cp=2, sequence_parallel=True, zero_stage=1), 6, ("0", "2", "1")),
    ]
    for layout, steps, weights in starts:
        pool.run(run_steps, 1, config_of(one, sources, Layout(), steps, weights, **ramp))
        pool.run(run_steps, layout.world_size, config_of(other, sources, layout, steps, weights, **ramp))
    first, second = rows(one, "step"), rows(other, "step")
    assert [row["step"] for row in second] == [1, 2, 3, 4, 5, 6]
    # FP32: ranks and micro-batches add in another order than one process
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-5)
    assert [row["tokens"] for row in second] == [64, 64, 128, 128, 128, 128]
    assert [row["flops"] for row in second] == [row["flops"] for row in first]
    for row, length in zip(second, [8, 8, 16, 16, 16, 16], strict=True):
        matrices = 6 * (2 * (32 * 64 + 32 * 32 + 3 * 32 * 64) + 258 * 32)
        attention = row["flops"] / row["tokens"] - matrices
        assert 12 * 2 * 32 * 1 < attention <= 12 * 2 * 32 * length, "documents end in some sequences, and cut none"
    evaluations = rows(other, "evaluation")
    assert [row["set"] for row in evaluations] == ["small", "large"] * 2
    for mine, reference in zip(evaluations, rows(one, "evaluation"), strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert mine["perplexity"] == pytest.approx(math.exp(mine["loss"]), rel=1e-12)
    assert CheckpointReader(other / "run" / "checkpoints" / "step-00000006").state["tokens"] == 2 * 64 + 4 * 128
    require_right_ledger(rows(other, "sources"), rows(one, "sources"), second)


def require_right_ledger(ledger: list[dict], reference: list[dict], steps: list[dict]) -> None:
    """Tokens of the sources add up to those that were read; the sources' losses make the step's."""
    read = 0
    for row, same, step in zip(ledger, reference, steps, strict=True):
        read += step["tokens"]
        assert sum(source["tokens"] for source in row["sources"].values()) == read
        for name, source in row["sources"].items():
            expected = same["sources"][name]
            assert (source["tokens"], source["epoch"]) == (expected["tokens"], expected["epoch"])
            assert source["loss"] == (expected["loss"] and pytest.approx(expected["loss"], rel=1e-5))
        losses = [source["loss"] for source in row["sources"].values() if source["loss"] is not None]
        rounding = 1e-6 * step["loss"]  # FP32: the sources' sums add in another order than the step's
        assert min(losses) - rounding <= step["loss"] <= max(losses) + rounding
    stopped = [row["sources"]["json"] for row in ledger]
    assert stopped[2]["tokens"] == stopped[5]["tokens"] > 0, "its weight is 0 from step 4 on"
    assert stopped[5]["loss"] is None
