"""The training data of a run: from its config, and from what earlier starts have read, to loaders.

Two lists fix which sample a step reads: batch sizes by step, and segments of weights by sample. Both are kept with a
checkpoint. A later start may change what is to come, never what was read.
"""

from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatrain.config.schema import DataConfig, ResolvedRun
from megatrain.data.errors import DataError
from megatrain.data.feed.blend import Blend, Segment, planned_segments
from megatrain.data.feed.loader import Loader
from megatrain.data.feed.objectives import build_objective
from megatrain.data.feed.rows import Samples
from megatrain.data.feed.samples import shuffled_samples, tells_documents_apart
from megatrain.data.feed.steps import Steps, StepShape, continued
from megatrain.data.feed.tokenizer_match import require_one_tokenizer
from megatrain.data.shards.reader import TokenDataset

# of the config's data section, with what was before there was a choice: they make the samples what they are
_FIXED = {"seed": None, "seq_len": None, "sequences": None, "objective": "causal"}


class TrainingData:
    """The sources of ``config``, opened. Starts at step 0, until ``resume`` says otherwise.

    ``names``: of the sources, in the order of ``Batch.sources``; ``blend``, ``steps``: what is read when.

    Args:
        vocab_size: the model's.
    Raises:
        DataError: a source can't be opened, or doesn't fit the model or the other sources.
    """

    def __init__(self, config: ResolvedRun, vocab_size: int):
        self.config = config
        data = config.data
        self.datasets = {
            name: TokenDataset.open(source.path, vocab_size=vocab_size) for name, source in data.train.items()
        }
        require_one_tokenizer(self.datasets.values(), data.tokenizer)
        self.samples: dict[str, Samples] = {
            name: shuffled_samples(dataset, data, f"{data.seed} {name} {dataset.digest}")
            for name, dataset in self.datasets.items()
        }
        self._objective = build_objective(data, next(iter(self.datasets.values()), None), vocab_size, "training")
        self.names = list(self.samples)
        self._plan = self._wanted_plan()
        segments, end = self._segments(0, [0] * len(self.names))
        self.blend = Blend(segments, str(data.seed), end)
        self.steps = Steps(wanted_shapes(config), data.seq_len)

    def loader(self, dp_rank: int, dp_size: int, pin: bool = False) -> Loader:
        """The batches of one of ``dp_size`` ranks."""
        sources = [self.samples[name] for name in self.names]
        return Loader(
            sources,
            self.blend,
            self.steps,
            dp_rank=dp_rank,
            dp_size=dp_size,
            documents=tells_documents_apart(self.config.data),
            objective=self._objective,
            pin=pin,
        )

    def require_samples(self, end_step: int) -> None:
        """
        Raises:
            DataError: the sources' caps are reached before ``end_step`` steps.
        """
        end = self.blend.num_samples
        if end is not None and self.steps.first_sample(end_step) > end:
            raise DataError(
                f"all sources reach their max_epochs after {end} samples, in step {self.steps.step_of(end)}; "
                f"train.steps is {end_step}: lower it, or raise a max_epochs"
            )

    def tokenizers(self) -> dict[str, str | None]:
        """SHA-256 of each source's tokenizer; None where a data set doesn't name one."""
        manifests = {name: self.datasets[name].manifest for name in self.names}
        return {name: manifest.tokenizer_sha256 if manifest else None for name, manifest in manifests.items()}

    def tokenizer_file(self) -> tuple[Path | None, str | None, int | None, str | None]:
        """(path of the tokenizer.json, its SHA-256, the id that ends documents, the token that begins them) of all
        sources, as far as they name them."""
        first = next((one for one in self.datasets.values() if one.manifest is not None), None)
        given = self.config.data.tokenizer
        if first is None or first.manifest is None:
            return (None if given is None else Path(given)), None, None, None
        path = first.tokenizer_path if given is None else Path(given)
        return path, first.manifest.tokenizer_sha256, first.eod_id, first.manifest.made_from.get("bos")

    def state(self, step: int) -> dict[str, Any]:
        """What ``resume`` needs to go on after ``step`` steps; plain JSON."""
        samples = self.steps.first_sample(step)
        sources = {
            name: {"digest": self.datasets[name].digest, "consumed": consumed}
            for name, consumed in zip(self.names, self.blend.counts(samples), strict=True)
        }
        return {
            **{name: getattr(self.config.data, name) for name in _FIXED},
            "samples": samples,
            "sources": sources,
            "plan": self._plan,
            "num_samples": self.blend.num_samples,
            "segments": [asdict(segment) for segment in self.blend.segments],
            "stages": [_saved_shape(shape) for shape in self.steps.shapes],
        }

    def resume(self, saved: dict[str, Any], step: int) -> None:
        """Goes on behind ``step`` steps of the run whose ``state`` was ``saved``.

        Where the config has other weights or batches than that run had, they hold from here on.

        Raises:
            DataError: the data or what makes samples of it is not the same (all that differs).
        """
        if not saved:  # weights that were converted from elsewhere: nothing was read yet
            return
        self.replay(saved)
        samples = self.steps.first_sample(step)
        if self._plan != saved["plan"]:
            segments, end = self._segments(samples, self.blend.counts(samples))
            past = [segment for segment in self.blend.segments if segment.start < samples]
            self.blend = Blend([*past, *segments], str(self.config.data.seed), end)
        self.steps = Steps(continued(self.steps.shapes, wanted_shapes(self.config), step), self.steps.window)

    def replay(self, saved: dict[str, Any]) -> None:
        """Reads what the run whose ``state`` was ``saved`` has read and was going to read.

        Raises:
            DataError: the data or what makes samples of it is not the same (all that differs).
        """
        self._require_same(saved)
        self.names = [*saved["sources"], *(name for name in self.samples if name not in saved["sources"])]
        self._plan = self._wanted_plan()
        new = len(self.names) - len(saved["sources"])
        segments = [_segment(fields, new) for fields in saved["segments"]]
        self.blend = Blend(segments, str(self.config.data.seed), saved["num_samples"])
        self.steps = Steps([_shape(fields) for fields in saved["stages"]], saved["seq_len"])

    def _require_same(self, saved: dict[str, Any]) -> None:
        different = [
            f"data.{name}: {before!r} before, {now!r} now"
            for name, (before, now) in {
                name: (saved.get(name, older), getattr(self.config.data, name)) for name, older in _FIXED.items()
            }.items()
            if before != now
        ]
        for name, source in saved["sources"].items():
            if name not in self.datasets:
                different.append(f"data.train.{name}: is gone. To read no more of it, set its weight to 0")
            elif source["digest"] != self.datasets[name].digest:
                different.append(
                    f"data.train.{name}: {self.datasets[name].folder} holds other data (digest "
                    f"{self.datasets[name].digest[:12]}…) than the run has read so far ({source['digest'][:12]}…)"
                )
        if different:
            listed = "\n  ".join(different)
            raise DataError(f"the run can't go on with these data:\n  {listed}\nput it back, or start another run")

    def _wanted_plan(self) -> dict[str, Any]:
        """Weights by sample and caps by source, as the config has them; plain JSON."""
        data = self.config.data
        weights = {name: Fraction(data.train[name].weight) for name in self.names}
        changes = [(0, weights)]
        for change in data.weight_schedule:
            changed = {name: Fraction(weight) for name, weight in change.weights.items()}
            changes.append((change.from_sample, {**changes[-1][1], **changed}))
        sizes = self._sizes(data)
        return {
            "changes": [
                [first, {name: str(weight * sizes[name]) for name, weight in weights.items()}]
                for first, weights in changes
            ],
            "caps": {name: self._cap(name) for name in self.names},
        }

    def _sizes(self, data: DataConfig) -> dict[str, Fraction]:
        if data.weigh_by == "weight":
            return dict.fromkeys(self.names, Fraction(1))
        if data.temperature == 1.0:
            return {name: Fraction(self.datasets[name].num_tokens) for name in self.names}
        roots = {name: self.datasets[name].num_tokens ** (1 / data.temperature) for name in self.names}
        # a power's last bits differ between machines; these 24 don't
        return {name: Fraction(round(root / max(roots.values()) * 2**24), 2**24) for name, root in roots.items()}

    def _cap(self, name: str) -> int | None:
        epochs = self.config.data.train[name].max_epochs
        return None if epochs is None else int(Fraction(str(epochs)) * self.samples[name].num_samples)

    def _segments(self, start: int, counts: Sequence[int]) -> tuple[list[Segment], int | None]:
        changes = [
            (first, [Fraction(weights[name]) for name in self.names]) for first, weights in self._plan["changes"]
        ]
        caps = [self._plan["caps"][name] for name in self.names]
        return planned_segments(changes, caps, self.names, start, counts)


def _saved_shape(shape: StepShape) -> dict[str, int]:
    return {"from_step": shape.after_step, "batch_size": shape.batch_size, "seq_len": shape.seq_len}


def _shape(saved: dict[str, int]) -> StepShape:
    return StepShape(saved["from_step"], saved["batch_size"], saved["seq_len"])


def wanted_shapes(config: ResolvedRun) -> list[StepShape]:
    """Batch sizes and sequence lengths by step, as the config has them."""
    train, data, after, shapes = config.train, config.data, 0, []
    for stage in train.ramp:
        size, length = stage.global_batch_size or train.global_batch_size, stage.seq_len or data.seq_len
        shapes.append(StepShape(after, size, length))
        after = stage.until_step
    return [*shapes, StepShape(after, train.global_batch_size, data.seq_len)]


def _segment(fields: dict[str, Any], new_sources: int) -> Segment:
    """A saved segment; sources that came later had no weight in it."""
    nothing = (0,) * new_sources
    return Segment(fields["start"], (*fields["weights"], *nothing), (*fields["counts"], *nothing), fields["length"])
