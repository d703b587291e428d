"""The parity matrix: cases that together hold every pair of features that go together, each against one process.

The cases are computed from the table of compatibility (tests/covering.py). By default those run that together hold
every feature; all others with ``-m slow``.
"""

import functools
import tempfile
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatrain.config.rules.check import check
from megatrain.config.rules.compatibility import SETTINGS
from megatrain.data.feed.objectives import Masked
from megatrain.spec.keys import flat
from tests.covering import (
    GPU_ONLY,
    IN_SAMPLE,
    MOST_RANKS,
    Case,
    allowed_pairs,
    covering,
    held,
    num_ranks,
    pairs_in_use,
    raw,
    sample,
    sections,
    used,
)
from tests.layouts import (
    SEQ_LEN,
    VOCAB_SIZE,
    Layout,
    Trained,
    build_engine,
    global_batch,
    run_config,
    train_steps,
    worst_state_error,
)
from tests.parallel.test_layouts import LOSS, NORM
from tests.pool import Pool

# Features that change the numbers: one process has them too. All others must not.
NUMBERS = (
    *(
        "family",
        "dropout",
        "attention_dropout",
        "num_experts",
        "expert_capacity",
        "num_shared_experts",
        "num_dense_layers",
    ),
    *(
        "blocks",
        "norm_placement",
        "expert_interval",
        "router_score",
        "router_groups",
        "router_balance_rate",
        "sequences",
        "objective",
    ),
    *("eod_loss", "ramp", "optimizer", "dtype", "gradient_dtype", "residual_dtype", "logits_dtype"),
)
# With a large epsilon AdamW's first steps are smooth in the gradient: lr * g / |g| would turn the rounding of a
# gradient near zero into a whole step. Lion's are signs, whatever the momentum: small ones.
OPTIMIZERS: dict[str, dict[str, Any]] = {"lion": {"lr": 1e-3}, "adafactor": {}, "": {"eps": 1e-2}}
WEIGHT = {"adamw": 1e-5, "cpu_adamw": 1e-5, "adafactor": 1e-4, "muon": 1e-4, "lion": 2.5e-2}
# (loss, norm) in 16 bits, as in tests/engine/test_precision.py
BANDS = {"fp32": (LOSS, NORM), "bf16": (1e-3, 3e-2), "fp16": (5e-4, 1e-2)}
STEPS = 3


def layout_of(case: Case) -> Layout:
    sizes = {name: raw(name, case[name]) for name in ("tp", "pp", "dp", "cp", "ep", "zero_stage")}
    sequence_parallel = case["sequence_parallel"] == "true"
    return Layout(
        **sizes, sequence_parallel=sequence_parallel, schedule=case["pp_schedule"], cp_method=case["cp_method"]
    )


def config_of(case: Case, folder: str) -> Any:
    """The resolved config of a case."""
    values = sections(case)
    values["model"] = flat(values["model"])
    values.pop("parallel")  # the layout says it
    if case["blocks"] == "window":
        values["model"]["attention.window"] = 5
    if case["num_experts"] != "0":
        values["model"] |= {"experts.per_token": 2, "experts.hidden_size": 16}
    if case["optimizer"] in ("lion", "adafactor"):  # a key's bias has a gradient of zero but for rounding,
        # of which Lion takes the sign, and Adafactor divides it by its own size
        values["model"]["attention.bias"] = False
    values["optimizer"] |= OPTIMIZERS.get(case["optimizer"], OPTIMIZERS[""])
    if "nvme" in (case["offload_optimizer"], case["offload_parameters"]):
        values["offload"] |= {"nvme_path": folder}
    return run_config(case["family"], layout_of(case), **values)


def alone(case: Case) -> Case:
    """What changes the numbers, in one process."""
    plain = {setting.name: setting.values[0] for setting in SETTINGS.values()} | {"pp_schedule": "1f1b"}
    same_numbers = {"cpu_adamw": "adamw"}
    return plain | {name: same_numbers.get(case[name], case[name]) for name in NUMBERS}


def batch_of(case: Case, step: int, rank: int, num_ranks: int, documents: bool = False) -> SimpleNamespace:
    """A rank's share of a step's batch, as the fields of ``data`` and the ramp make it."""
    sequences = case["sequences"]
    batch = global_batch(step, rank, num_ranks, documents=sequences != "one_document")
    places = torch.arange(SEQ_LEN)
    if sequences == "one_document":  # then padding, which sees only itself
        lengths = 5 + batch.sample_ids[:, None] % (SEQ_LEN - 4)
        batch.labels = batch.labels.masked_fill(places >= lengths - 1, -100)
        batch.positions = torch.where(places < lengths, places, places - lengths)
        batch.lengths = lengths[:, 0]
    else:
        if case["eod_loss"] == "false" or (case["eod_loss"] == "null" and sequences != "concatenate"):
            ends = torch.nn.functional.pad(batch.positions[:, 1:] == 0, (0, 1), value=True)
            batch.labels = batch.labels.masked_fill(ends, -100)
        if sequences == "concatenate":
            batch.positions = None
    for stage in raw("ramp", case["ramp"]):
        if step <= stage["until_step"]:
            cut = {name: getattr(batch, name) for name in ("tokens", "labels", "positions")}
            vars(batch).update({name: None if x is None else x[:, : stage["seq_len"]] for name, x in cut.items()})
            batch.lengths = None if batch.lengths is None else batch.lengths.clamp(max=stage["seq_len"])
    return Masked("matrix", 0.4, VOCAB_SIZE - 1, VOCAB_SIZE)(batch) if case["objective"] == "masked" else batch


@dataclass
class Ran:
    """What a rank saw. ``again``: the loss of the last step, done again from a checkpoint of the state before it."""

    trained: Trained
    again: float


def run_case(case: Case, folder: str) -> Ran:
    """The steps of a case; a checkpoint is written while the last of them runs. Runs on every rank."""
    # traced and differentiated, but without C++ for each block, which takes half a minute
    traced = functools.partial(torch.compile, backend="aot_eager")
    config = config_of(case, folder)
    torch.use_deterministic_algorithms(config.train.deterministic)
    with unittest.mock.patch.object(torch, "compile", traced):
        engine = build_engine(config)
        try:
            return train_around_a_save(engine, functools.partial(batch_of, case), Path(folder))
        finally:
            engine.close()
            torch._dynamo.reset()
            torch.use_deterministic_algorithms(False)


def train_around_a_save(engine: Any, batch: Any, folder: Path) -> Ran:
    from megatrain.checkpoint.load import load_checkpoint
    from megatrain.checkpoint.save import Saver

    saver = Saver(engine, folder, "run", background=engine.config.checkpoint.background)
    share = engine.mesh.coordinate("dp"), engine.mesh.topology.dp
    before = [engine.train_step(batch(step, *share), step) for step in range(1, STEPS)]
    saver.begin(STEPS - 1, {"data": {}}, {})
    trained = train_steps(engine, STEPS, STEPS, batch_of=batch)
    trained.losses[:0] = [float(result.loss) for result in before]
    trained.grad_norms[:0] = [float(result.grad_norm) for result in before]
    outcome = saver.finish()
    assert outcome is not None and outcome.problem is None, outcome
    load_checkpoint(engine, outcome.path, lambda data, step: None)
    return Ran(trained, float(engine.train_step(batch(STEPS, *share), STEPS).loss))


@functools.cache
def one_process(pool: Pool, numbers: tuple[tuple[str, str], ...]) -> Trained:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        return pool.run(run_case, 1, dict(numbers), folder)[0].trained


def memory() -> str | None:
    """Where folders lie in memory, if there is such a place: the disk is not what is tested."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def cases() -> list:
    """All that ``covering`` finds, by number and layout; the rest of a case stands in the failure."""
    chosen = sample()
    return [
        pytest.param(case, id=f"{number}-{layout_of(case)}", marks=() if case in chosen else pytest.mark.slow)
        for number, case in enumerate(covering())
    ]


@pytest.mark.timeout(900)  # an operator may be compiled
@pytest.mark.parametrize("case", cases())
def test_features_together_equal_one_process(
    pool: Pool, memory_path: Path, operator: Callable[[str], None], case: Case
) -> None:
    if "nvme" in case.values():
        operator("AsyncIOBuilder")
    if case["optimizer"] == "cpu_adamw":
        operator("CPUAdamBuilder")
    reference = one_process(pool, tuple(alone(case).items()))
    ranks = pool.run(run_case, num_ranks(case), case, str(memory_path))
    loss, norm = BANDS[case["dtype"]]
    for ran in ranks:
        trained = ran.trained
        assert trained.losses == pytest.approx(reference.losses, rel=loss)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=norm)
        assert trained.evaluation == pytest.approx(reference.evaluation, rel=loss)
        assert trained.skipped == [False]
        assert ran.again == pytest.approx(trained.losses[-1], rel=1e-6), "the checkpoint is the state that was saved"
    if case["dtype"] == "fp32":
        check_state(case, [ran.trained for ran in ranks], reference)


def check_state(case: Case, ranks: list[Trained], reference: Trained) -> None:
    """Weights and routing, where nothing is rounded to 16 bits."""
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT[case["optimizer"]], f"{name} differs by {error:.1e}"
    for trained in ranks:
        assert trained.sequence_losses == pytest.approx(reference.sequence_losses, rel=LOSS)
        for layer, values in reference.routing[0].items():
            for name, value in values.items():
                assert trained.routing[0][layer][name] == pytest.approx(value, rel=LOSS), f"{layer}: {name}"


def test_the_cases_hold_every_allowed_pair() -> None:
    tried = {pair for case in covering() for pair in held(case)}
    assert {frozenset(pair) for pair in pairs_in_use()} <= tried
    for case in covering():
        assert check(config_of(case, "disk"), num_ranks(case)) == []
        assert num_ranks(case) <= MOST_RANKS


def test_an_allowed_pair_that_no_case_holds_does_nothing_or_needs_a_gpu() -> None:
    routing = ("router_score", "router_groups", "router_balance_rate")
    idle = {("cp", "cp_method"), ("document_attention", "sequences")}  # at cp 1, and without documents
    idle |= {("num_experts", name) for name in routing} | {(name, "optimizer") for name in routing}  # dense
    of_zero = [
        setting.name for setting in SETTINGS.values() if setting.used_with and setting.used_with[0] == "zero_stage"
    ]
    idle |= {("zero_stage", name) for name in of_zero}  # at a stage that does not ask for them
    not_at_3 = ("ep", "pp", "pp_schedule", "optimizer", "activation_checkpointing")
    idle |= {(other, name) for other in not_at_3 for name in of_zero if name != "reduce_bucket_size"}
    left_out = set(allowed_pairs()) - pairs_in_use().keys()
    assert {(one[0], two[0]) for one, two in left_out if not GPU_ONLY.keys() & {one, two}} == idle
    assert len(pairs_in_use()) > 3500


def test_the_default_cases_use_every_feature() -> None:
    assert set().union(*map(used, sample())) >= IN_SAMPLE
