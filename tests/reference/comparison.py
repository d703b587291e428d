"""Holds a run against the reference, step by step, by what lies in its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.reference.files import read_checkpoint, read_config, read_metrics
from tests.reference.trainer import StepRecord, Trainer


@dataclass(frozen=True)
class Bands:
    """Largest relative errors. ``loss``: of losses, evaluations and routers' entropies; ``norm``: of gradient norms.

    ``update``: of a weight, relative to the largest change of its tensor so far; ``moment``: relative to the largest.
    """

    loss: float
    norm: float
    update: float
    moment: float


def differences(run: Path, bands: Bands) -> tuple[list[str], dict[str, float]]:
    """What lies outside of its band, and the largest error of each kind."""
    config, records = read_config(run), read_metrics(run)
    reference, found = Trainer(config), _Found(bands)
    initial = dict(reference.weights)
    steps = {record["step"]: record for record in records if record["kind"] == "step"}
    sources = {record["step"]: record["sources"] for record in records if record["kind"] == "sources"}
    evaluations: dict[int, dict[str, float]] = {}
    for record in records:
        if record["kind"] == "evaluation":
            evaluations.setdefault(record["step"], {})[record["set"]] = record["loss"]
    number = config["train"]["steps"]
    assert list(steps) == list(range(1, number + 1)), "every step is logged"
    assert number in evaluations, "the last step is evaluated"
    for step, logged in steps.items():
        expected_step = reference.step(step)
        found.compare_step(step, logged, expected_step)
        found.compare_sources(step, sources[step], expected_step.sources)
        if step in evaluations:
            expected = reference.evaluate()
            found.same(f"validation sets at step {step}", sorted(evaluations[step]), sorted(expected))
            for name, loss in expected.items():
                found.near("loss", f"evaluation of {name} at step {step}", evaluations[step][name], loss)
    state, arrays = read_checkpoint(run / "checkpoints" / f"step-{number:08}")
    found.same("updates", state["optimizer_steps"], reference.num_updates)
    found.compare_biases(state["router_biases"], reference.biases)
    found.compare_arrays("weight", arrays.pop("weight"), reference.weights, initial)
    kinds = {kind for kept in reference.kept.values() for kind in kept}
    found.same("kinds of moments", sorted(arrays), sorted(kinds))
    for kind in sorted(kinds & set(arrays)):
        expected = {name: kept[kind] for name, kept in reference.kept.items() if kind in kept}
        found.compare_arrays(kind, arrays[kind], expected, {})
    return found.problems, found.worst


class _Found:
    def __init__(self, bands: Bands):
        self.bands, self.problems, self.worst = bands, [], dict.fromkeys(vars(bands), 0.0)
        self.problems: list[str]

    def same(self, what: str, value: Any, expected: Any) -> None:
        if value != expected:
            self.problems.append(f"{what}: {value}, not {expected}")

    def near(self, kind: str, what: str, value: float, expected: float, size: float | None = None) -> None:
        error = abs(value - expected) / (abs(expected) if size is None else size) if value != expected else 0.0
        self.worst[kind] = max(self.worst[kind], error)
        if not error <= getattr(self.bands, kind):
            self.problems.append(f"{what}: {value!r}, not {expected!r}; relative error {error:.1e}")

    def compare_step(self, step: int, logged: dict[str, Any], expected: StepRecord) -> None:
        for name in ("loss_scale", "skipped", "tokens"):
            self.same(f"{name} of step {step}", logged[name], getattr(expected, name))
        if abs(logged["lr"] - expected.lr) > 1e-12 * expected.lr:  # both in FP64
            self.same(f"lr of step {step}", logged["lr"], expected.lr)
        self.near("loss", f"loss of step {step}", logged["loss"], expected.loss)
        if not expected.skipped:  # what overflowed has no norm
            self.near("norm", f"gradient norm of step {step}", logged["grad_norm"], expected.grad_norm)
        routing = logged.get("routing", {})
        self.same(f"mixtures at step {step}", sorted(routing), sorted(expected.routing))
        for block, own in expected.routing.items():
            self.same(f"loads of {block} at step {step}", routing[block]["load"], own["load"])
            self.same(f"drops of {block} at step {step}", routing[block]["drop_rate"], own["drop_rate"])
            self.near("loss", f"entropy of {block} at step {step}", routing[block]["entropy"], own["entropy"])

    def compare_sources(self, step: int, logged: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
        self.same(f"sources at step {step}", list(logged), list(expected))
        for name, own in expected.items():
            for key in ("tokens", "epoch"):
                self.same(f"{key} of {name} at step {step}", logged[name][key], own[key])
            if own["loss"] is None or logged[name]["loss"] is None:
                self.same(f"loss of {name} at step {step}", logged[name]["loss"], own["loss"])
            else:
                self.near("loss", f"loss of {name} at step {step}", logged[name]["loss"], own["loss"])

    def compare_biases(self, saved: dict[str, list[float]], expected: dict[int, Tensor]) -> None:
        names = {f"layers.{block}.feed_forward.router.balance_bias": bias for block, bias in expected.items()}
        self.same("routers with a bias", sorted(saved), sorted(names))
        for name, bias in names.items():  # sums of a few equal FP32 numbers
            if not torch.allclose(torch.tensor(saved[name], dtype=torch.float64), bias, rtol=1e-6, atol=1e-7):
                self.same(name, saved[name], bias.tolist())

    def compare_arrays(
        self, kind: str, saved: dict[str, Tensor], expected: dict[str, Tensor], initial: dict[str, Tensor]
    ) -> None:
        """Tensor by tensor, relative to the largest change from ``initial``, or the largest value without it."""
        self.same(f"names of {kind}", sorted(saved), sorted(expected))
        for name in sorted(saved.keys() & expected.keys()):
            if saved[name].shape != expected[name].shape:
                self.same(f"shape of {kind} {name}", saved[name].shape, expected[name].shape)
                continue
            size = float((expected[name] - initial.get(name, 0.0)).abs().max())
            error = float((saved[name].double() - expected[name]).abs().max())
            # a gradient that is zero but for rounding has no size of its own (a bias of all keys does nothing)
            size = max(size, 1e-7)
            self.near("update" if kind == "weight" else "moment", f"{kind} {name}", error, 0.0, size)
