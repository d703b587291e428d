"""One test body for every layout: train a tiny model and give back what must not depend on the layout."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatrain.config.derive import resolve
from megatrain.config.rules.check import check
from megatrain.config.schema import ResolvedRun, RunConfig
from tests.configs import run_config_of

SEQ_LEN, VOCAB_SIZE, GLOBAL_BATCH_SIZE, LEARNING_RATE = 16, 64, 16, 1e-2


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    schedule: str = "1f1b"
    cp: int = 1
    cp_method: str = "all_gather"
    ep: int = 1

    @property
    def stages_per_rank(self) -> int:
        return 1 if self.schedule in ("1f1b", "gpipe") else 2

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def __str__(self) -> str:
        marks = ("sp-" if self.sequence_parallel else "") + (f"{self.schedule}-" if self.schedule != "1f1b" else "")
        context = f"cp{self.cp}-{self.cp_method}-" if self.cp > 1 else ""
        experts = f"ep{self.ep}-" if self.ep > 1 else ""
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}-{context}{experts}{marks}zero{self.zero_stage}"


ONE_PROCESS = Layout()


def run_config(family: str, layout: Layout, **sections: dict[str, Any]) -> ResolvedRun:
    """A resolved config of a tiny model (5 layers: no even split over 2 stages).

    It must pass the rules: so whatever a test trains is a witness against a refusal that should not be.
    """
    # the size of a micro-batch changes no number; at least two of them are summed
    micro_batch_size = 4 if layout.stages_per_rank == 1 and layout.dp <= 2 else 2
    config: dict[str, dict[str, Any]] = {
        "model": {
            "family": family,
            "num_layers": 5,
            "hidden_size": 32,
            "attention.num_heads": 4,
            "attention.num_kv_heads": 2,
            "feed_forward.hidden_size": 64,
            "vocab_size": VOCAB_SIZE,
            "max_seq_len": SEQ_LEN,
            "tie_embeddings": family == "gpt",
        },
        "parallel": {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "cp": layout.cp,
            "cp_method": layout.cp_method,
            "ep": layout.ep,
            "sequence_parallel": layout.sequence_parallel,
            "zero_stage": layout.zero_stage,
            "stages_per_rank": layout.stages_per_rank,
            "pp_schedule": layout.schedule,
        },
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": LEARNING_RATE, "grad_clip": 0.5},
        "schedule": {"warmup_steps": 2, "decay_steps": 100},
        "train": {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": micro_batch_size},
        "data": {"seq_len": SEQ_LEN},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    checked = run_config_of(config)
    assert (problems := check(checked, layout.world_size)) == [], problems
    return resolve(checked, layout.world_size)


def global_batch(step: int, rank: int = 0, num_ranks: int = 1, documents: bool = False) -> SimpleNamespace:
    """A rank's share of a step's random batch, whose micro-batches hold different numbers of loss tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(0, VOCAB_SIZE, (2, GLOBAL_BATCH_SIZE, SEQ_LEN), generator=generator)
    labels[0, :12] = -100
    labels[3] = -100
    size = GLOBAL_BATCH_SIZE // num_ranks
    own = slice(rank * size, (rank + 1) * size)
    return SimpleNamespace(
        tokens=tokens[own],
        labels=labels[own],
        sample_ids=torch.arange(GLOBAL_BATCH_SIZE)[own] + step * 1000,
        positions=random_positions(generator)[own] if documents else None,
        lengths=None,
    )


def padded_batch(step: int, rank: int = 0, num_ranks: int = 1, documents: bool = False) -> SimpleNamespace:
    """The same with one document in each sequence and then padding, from no token of a document to all."""
    batch = global_batch(step, rank, num_ranks, documents)
    batch.lengths = batch.sample_ids * 3 % (SEQ_LEN + 1)
    batch.labels = batch.labels.masked_fill(torch.arange(SEQ_LEN) >= batch.lengths[:, None] - 1, -100)
    return batch


def random_positions(generator: torch.Generator) -> torch.Tensor:
    """Positions of sequences that hold 1 to 6 documents."""
    begins = torch.rand(GLOBAL_BATCH_SIZE, SEQ_LEN, generator=generator) < 0.2
    begins[:, 0] = True
    places = torch.arange(SEQ_LEN).expand_as(begins)
    return places - torch.where(begins, places, 0).cummax(1).values


def build_engine(config: RunConfig) -> Any:
    """The engine of this rank, as the launcher builds it."""
    from megatrain.train.build import build_engine as build

    return build(config, torch.device("cpu"))


@dataclass
class Trained:
    """What one rank saw: the same losses and norms as all others, and its parts of the state."""

    losses: list[float]
    sequence_losses: list[float]  # of the last step, all sequences of the global batch in order
    grad_norms: list[float]
    skipped: list[bool]
    loss_scales: list[float]
    evaluation: float
    state: dict[tuple[str, str], tuple[np.ndarray, tuple[int, ...]]]  # (part, its offset in the whole tensor)
    routing: list[dict[str, dict[str, Any]]]


def train_steps(engine: Any, first: int, last: int, documents: bool = False, batch_of: Any = global_batch) -> Trained:
    share = engine.mesh.coordinate("dp"), engine.mesh.topology.dp, documents
    results = [engine.train_step(batch_of(step, *share), step) for step in range(first, last + 1)]
    from megatrain.engine.state import export_state
    from megatrain.parallel.marks import Split, place

    splits = {"tp": Split.over(engine.mesh.tp_group), "ep": Split.over(engine.mesh.ep_group)}
    parameters = dict(engine.parameters)
    return Trained(
        losses=[float(result.loss) for result in results],
        sequence_losses=whole_batch(engine, results[-1].losses),
        grad_norms=[float(result.grad_norm) for result in results],
        skipped=[result.skipped for result in results],
        loss_scales=[result.loss_scale for result in results],
        evaluation=float(engine.evaluate(batch_of(99, *share))[0]),
        state={
            (kind, name): (t.numpy().copy(), place(parameters[name], t.shape, splits)[0])
            for kind, name, t in export_state(engine)
        },
        routing=[result.routing.read() if result.routing else {} for result in results],
    )


def whole_batch(engine: Any, own: torch.Tensor) -> list[float]:
    """All ranks' losses by sequence, from this rank's own."""
    losses = torch.zeros(GLOBAL_BATCH_SIZE)
    first = engine.mesh.coordinate("dp") * len(own)
    losses[first : first + len(own)] = own
    return engine.over_all_ranks(losses).tolist()


def train(
    family: str,
    layout: Layout,
    steps: int = 5,
    documents: bool = False,
    batch_of: Any = global_batch,
    **sections: dict[str, Any],
) -> Trained:
    """The test body; runs on every rank of a layout."""
    engine = build_engine(run_config(family, layout, **sections))
    try:
        return train_steps(engine, 1, steps, documents, batch_of)
    finally:
        engine.close()


def worst_state_error(ranks: list[Trained], reference: Trained, kind: str = "weight") -> tuple[float, str]:
    """Largest difference of any tensor of any rank, relative to the largest value of that tensor, and its name."""
    worst, where = 0.0, ""
    seen = set()
    for trained in ranks:
        for (this_kind, name), (part, offset) in trained.state.items():
            if this_kind != kind:
                continue
            seen.add(name)
            whole = reference.state[kind, name][0]
            whole = whole[tuple(slice(first, first + size) for first, size in zip(offset, part.shape, strict=True))]
            assert part.shape == whole.shape, f"{name}: {part.shape} is no part of {whole.shape}"
            error = float(np.abs(part - whole).max() / np.abs(whole).max())
            if error > worst:
                worst, where = error, name
    assert seen == {name for this_kind, name in reference.state if this_kind == kind}, "a parameter is missing"
    return worst, where
