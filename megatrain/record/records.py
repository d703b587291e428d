"""What a run reports: each kind of record says by itself how it looks to every reader.

``line``: on the console; ``row``: in ``metrics.jsonl``; ``scalars``: in TensorBoard.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Protocol

ONLY_SET = "validation"
"""Name of a validation set that the config gives none."""
_LONGEST_PERPLEXITY = 1e6
"""Larger ones say nothing by their digits, and are shown by their power of ten."""


class Record(Protocol):
    """Something that is reported after ``step`` steps."""

    @property
    def step(self) -> int: ...

    def line(self) -> str | None:
        """Text for people, None where it is not for the console."""

    def row(self) -> dict[str, Any]:
        """Everything that is known, as JSON."""

    def scalars(self) -> dict[str, float | None]:
        """Numbers that make a curve; None: not known."""


@dataclass(frozen=True)
class StepRecord:
    """One logging step.

    ``tokens``, ``flops`` (the model's own operations, see ``Work``; both over all ranks), ``seconds``, ``num_steps``
    and ``num_skipped`` (steps whose gradients were not finite, and which changed nothing) cover all steps since the
    record before; ``steps_left``: how many the run has yet to make; ``skipped``: whether this one was; ``mfu``: None
    where the peak of the hardware is not known; ``routing``: of a mixture's layers, as ``RoutingReport.read`` gives it.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    tokens: int
    flops: float
    seconds: float
    num_steps: int
    steps_left: int
    mfu: float | None = None
    num_skipped: int = 0
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def line(self) -> str:
        remaining = timedelta(seconds=round(self.seconds / self.num_steps * self.steps_left))
        parts = [
            f"loss {self.loss:.4f}",
            f"grad norm {self.grad_norm:.3f}",
            f"lr {self.lr:.2e}",
            f"{self.tokens_per_second:,.0f} tokens/s",
            "mfu -" if self.mfu is None else f"mfu {self.mfu:.1%}",
            f"loss scale {self.loss_scale:g}",
            f"eta {remaining}",
        ]
        if self.num_skipped > self.skipped:
            parts.append(f"{self.num_skipped} steps skipped")
        return " | ".join(parts + ["skipped (gradients not finite)"] * self.skipped)

    def row(self) -> dict[str, Any]:
        names = ("step", "loss", "grad_norm", "lr", "loss_scale", "skipped", "tokens", "flops", "seconds")
        row = {"kind": "step", **{name: getattr(self, name) for name in (*names, "num_skipped")}}
        routing = {"routing": self.routing} if self.routing else {}
        return {**row, **routing, "tokens_per_second": self.tokens_per_second, "mfu": self.mfu}

    def scalars(self) -> dict[str, float | None]:
        return {
            "train/loss": self.loss,
            "train/grad_norm": self.grad_norm,
            "train/lr": self.lr,
            "train/loss_scale": self.loss_scale,
            "train/skipped": float(self.skipped),
            "train/num_skipped": float(self.num_skipped),
            "throughput/tokens_per_second": self.tokens_per_second,
            "throughput/mfu": self.mfu,
            **_routing_scalars(self.routing),
        }


def _routing_scalars(routing: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """``largest_load`` is a multiple of the even share: 1 is perfect balance."""
    scalars: dict[str, float | None] = {}
    for layer, values in routing.items():
        scalars[f"routing/{layer}/largest_load"] = max(values["load"]) * len(values["load"])
        scalars[f"routing/{layer}/entropy"] = values["entropy"]
        scalars[f"routing/{layer}/drop_rate"] = values["drop_rate"]
    return scalars


@dataclass(frozen=True)
class SourceCounts:
    """One source of the training data. ``tokens``, ``epoch``: read so far; ``loss``: mean since the last record."""

    tokens: int
    epoch: float
    loss: float | None


@dataclass(frozen=True)
class SourcesRecord:
    """What the sources of the training data, by name, have given so far."""

    step: int
    sources: Mapping[str, SourceCounts]

    def line(self) -> None:
        return None

    def row(self) -> dict[str, Any]:
        return {"kind": "sources", "step": self.step, "sources": {name: asdict(c) for name, c in self.sources.items()}}

    def scalars(self) -> dict[str, float | None]:
        return {
            f"data/{name}/{key}": value
            for name, counts in self.sources.items()
            for key, value in asdict(counts).items()
        }


@dataclass(frozen=True)
class EvaluationRecord:
    """The weights after ``step`` on the validation set ``name``; ``loss``: mean over the tokens, in nats."""

    step: int
    loss: float
    name: str = ONLY_SET

    @property
    def perplexity(self) -> float:
        """e to the power of the loss; infinity where no float is so large (a loss above 709)."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def line(self) -> str:
        shown = f"{self.perplexity:,.2f}" if self.perplexity < _LONGEST_PERPLEXITY else f"{self.perplexity:.3g}"
        title = "validation" if self.name == ONLY_SET else f"validation {self.name}"
        return f"{title} loss {self.loss:.4f} | perplexity {shown}"

    def row(self) -> dict[str, Any]:
        values = {"loss": self.loss, "perplexity": self.perplexity}
        return {"kind": "evaluation", "step": self.step, "set": self.name, **values}

    def scalars(self) -> dict[str, float | None]:
        tag = "evaluation" if self.name == ONLY_SET else f"evaluation/{self.name}"
        return {f"{tag}/loss": self.loss, f"{tag}/perplexity": self.perplexity}


@dataclass(frozen=True)
class Event:
    """Something that happened: told by ``text``, with ``fields`` for programs."""

    kind: str
    step: int
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        return self.text

    def row(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, **self.fields}

    def scalars(self) -> dict[str, float | None]:
        numbers = {name: float(value) for name, value in self.fields.items() if isinstance(value, int | float)}
        return {f"{self.kind}/{name}": value for name, value in numbers.items()}
