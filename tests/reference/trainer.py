"""Trains a run's config from its data sets, in FP64: what the run must have logged and saved.

Shapes: B sequences, S positions.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.reference.data_order import Blend, stages
from tests.reference.dropout import Dropout
from tests.reference.files import Corpus, dotted, read_corpus
from tests.reference.initial import initial_weights, mixture_blocks
from tests.reference.model import Output, Places, run
from tests.reference.optimizers import State, update_of
from tests.reference.rules import decay_and_scale
from tests.reference.scaler import LARGEST, LossScaler
from tests.reference.schedules import rate
from tests.reference.sequences import Source, as_arrays, tells_documents_apart


@dataclass
class Batch:
    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    real: Tensor
    """Whether a token is none of padding."""
    ids: list[int] | None
    """Global numbers of the sequences; None in an evaluation."""
    sources: list[int] = field(default_factory=list)
    """Numbers of the sources of the sequences."""

    @property
    def loss_tokens(self) -> int:
        return max(1, int((self.labels >= 0).sum()))


@dataclass
class StepRecord:
    """As in ``metrics.jsonl``."""

    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    tokens: int
    routing: dict[str, dict[str, Any]]
    sources: dict[str, dict[str, Any]]


class Trainer:
    """``config``: of a run, resolved. ``steps`` trains it; ``weights``, ``kept`` and ``biases`` are what came out."""

    def __init__(self, config: dict[str, Any]):
        self.config, self.model, data = config, dotted(config["model"]), config["data"]
        self.weights = initial_weights(self.model, config["train"]["seed"])
        if config["precision"]["dtype"] == "fp16":  # DeepSpeed makes the FP32 weights of those of the step
            self.weights = {name: weight.half().double() for name, weight in self.weights.items()}
        self.kept: dict[str, State] = {name: {} for name in self.weights}
        balanced = mixture_blocks(self.model) if self.model["router.balance_rate"] else []
        zeros = torch.zeros(self.model["experts.num_experts"] or 0, dtype=torch.float64)
        self.biases = dict.fromkeys(balanced, zeros)
        self.num_updates = 0
        self._scaler = LossScaler(config["precision"])
        self._stages = stages(config)
        opened = {name: read_corpus(Path(source["path"])) for name, source in data["train"].items()}
        self._sources = [Source(corpus, name, data) for name, corpus in opened.items()]
        self._blend = Blend(_weights_by_sample(data, opened), data["seed"])
        self.validation = {name: Source(read_corpus(Path(p)), name, data) for name, p in data["validation"].items()}

    def batch(self, step: int) -> Batch:
        """Of step number ``step``, the first being 1."""
        count, length, first = self._stages[step - 1]
        window = self.config["data"]["seq_len"]
        samples = range(first, first + count * length // window)
        found = [self._blend(sample) for sample in samples]
        rows = [self._sources[source].shuffled(number) for source, number in found]
        cuts = range(window // length)
        batch = self._as_batch(*as_arrays(rows, length), [sample + cut * 2**48 for sample in samples for cut in cuts])
        batch.sources = [source for source, _ in found for _ in cuts]
        return batch

    def step(self, step: int) -> StepRecord:
        """One step: loss over its loss tokens, gradients, their norm, one update of each weight."""
        batch, optimizer = self.batch(step), self.config["optimizer"]
        weights = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
        output = self._run(weights, batch)
        output.logits_BSV.retain_grad()
        ((output.losses_B.sum() + output.side_loss) / batch.loss_tokens).backward()
        gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        scale, skipped = self._scaler.scale, self._overflows(output, gradients)
        lr = rate(step, self.config["train"]["steps"], self.config["schedule"], optimizer["lr"])
        self._scaler.step(skipped)
        if not skipped:
            # Pascanu et al. 2013, algorithm 1: the gradient's length is at most the threshold
            clip = optimizer["grad_clip"] / norm if 0 < optimizer["grad_clip"] < norm else 1.0
            self._update({name: gradient * clip for name, gradient in gradients.items()}, lr)
            self._move_biases(output)
        loss = float(output.losses_B.detach().sum()) / batch.loss_tokens
        routing = {f"layers.{block}": _routing(found) for block, found in output.routing.items()}
        by_source = self._by_source(step, batch, output.losses_B.detach())
        return StepRecord(loss, norm, lr, scale, skipped, batch.tokens.numel(), routing, by_source)

    def _by_source(self, step: int, batch: Batch, losses_B: Tensor) -> dict[str, dict[str, Any]]:
        """Mean loss in this step, tokens and epochs read up to its end."""
        count, length, first = self._stages[step - 1]
        window = self.config["data"]["seq_len"]
        given = [self._blend(sample)[0] for sample in range(first + count * length // window)]
        found = {}
        for number, name in enumerate(self.config["data"]["train"]):
            own = torch.tensor(batch.sources) == number
            tokens = int((batch.labels[own] >= 0).sum())
            read = given.count(number)
            loss = float(losses_B[own].sum()) / tokens if tokens else None
            epoch = read / self._sources[number].num_samples
            found[name] = {"tokens": read * window, "epoch": epoch, "loss": loss}
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the first batches of each validation set, without dropout."""
        size, most = self.config["train"]["global_batch_size"], self.config["train"]["eval_batches"]
        found = {}
        for name, source in self.validation.items():
            total, count = 0.0, 0
            for first in range(0, min(source.num_ordered, most * size), size):
                rows = [source.ordered(number) for number in range(first, min(first + size, source.num_ordered))]
                batch = self._as_batch(*as_arrays(rows, source.length), None)
                total += float(self._run(self.weights, batch).losses_B.sum())
                count += int((batch.labels >= 0).sum())
            found[name] = total / count
        return found

    def _run(self, weights: dict[str, Tensor], batch: Batch) -> Output:
        chances = (self.model[key] for key in ("dropout", "attention.dropout"))
        hidden, scores = (Dropout(chance, self.config["train"]["seed"], batch.ids) for chance in chances)
        return run(
            self.model,
            weights,
            batch.tokens,
            batch.labels,
            Places.of(batch.positions, batch.real),
            (hidden, scores),
            self.biases,
        )

    def _as_batch(self, tokens: Any, labels: Any, positions: Any, real: Any, ids: list[int] | None) -> Batch:
        apart = tells_documents_apart(self.config["data"]["sequences"])
        own = torch.from_numpy(positions) if apart else None
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), own, torch.from_numpy(real).bool(), ids)

    def _update(self, gradients: dict[str, Tensor], lr: float) -> None:
        self.num_updates += 1
        optimizer = self.config["optimizer"]
        for name, weight in self.weights.items():
            decay, scale = decay_and_scale(name, weight, optimizer)
            update = update_of(optimizer["name"], name, weight)
            own = {**optimizer, "stacked_rows": self._stacked_rows(name)}
            arguments = weight, gradients[name], self.kept[name], self.num_updates, lr * scale, decay, own
            self.weights[name] = update(*arguments)

    def _stacked_rows(self, name: str) -> list[int] | None:
        """Rows of a group's queries, key and value, where Muon takes these apart."""
        if not (self.config["optimizer"].get("muon_split_qkv") and name.endswith("query_key_value.weight")):
            return None
        width = self.model["attention.head_width"]
        return [self.model["attention.num_heads"] // self.model["attention.num_kv_heads"] * width, width, width]

    def _move_biases(self, output: Output) -> None:
        """Wang et al. 2024, algorithm 1: against the load of the whole batch."""
        for block, bias in self.biases.items():
            counts = output.routing[block].counts_E.double()
            self.biases[block] = bias + self.model["router.balance_rate"] * (counts.mean() - counts).sign()

    def _overflows(self, output: Output, gradients: dict[str, Tensor]) -> bool:
        """Whether a scaled gradient leaves FP16's range; the case must be clear, for FP64 rounds nothing."""
        if self.config["precision"]["dtype"] != "fp16":
            return False
        assert output.logits_BSV.grad is not None
        largest = max(float(g.abs().max()) for g in [output.logits_BSV.grad, *gradients.values()])
        reach = largest * self._scaler.scale / LARGEST
        assert not 0.9 < reach < 1.1, f"largest gradient {reach} of FP16's largest number: choose another scale"
        return reach > 1


def _weights_by_sample(data: dict[str, Any], corpora: dict[str, Corpus]) -> list[tuple[int, list[Fraction]]]:
    """docs/data.md: by sample, times the sources' tokens to the power of 1 / temperature where these weigh."""
    sizes = dict.fromkeys(corpora, Fraction(1))
    if data["weigh_by"] == "tokens":
        sizes = {name: Fraction(len(c.stream) ** (1 / data["temperature"])) for name, c in corpora.items()}
    current = {name: Fraction(str(source["weight"])) for name, source in data["train"].items()}
    changes = []
    for first, weights in [
        (0, {}),
        *((change["from_sample"], change["weights"]) for change in data["weight_schedule"]),
    ]:
        current |= {name: Fraction(str(weight)) for name, weight in weights.items()}
        changes.append((first, [weight * sizes[name] for name, weight in current.items()]))
    return changes


def _routing(found: Any) -> dict[str, Any]:
    choices = int(found.counts_E.sum())
    return {
        "load": [count / choices for count in found.counts_E.tolist()],
        "entropy": found.entropy / found.tokens,
        "drop_rate": found.dropped / choices,
    }
