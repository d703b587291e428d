"""What each source of the training data has given, and what the model makes of it."""

import torch

from megatrain.data.feed.rows import Batch
from megatrain.data.feed.training import TrainingData
from megatrain.engine.engine import Engine
from megatrain.record.records import SourceCounts
from megatrain.spec.labels import IGNORE


class Ledger:
    """Sums losses by source on the device, and reads them only when a record is wanted."""

    def __init__(self, data: TrainingData, engine: Engine):
        self.data, self.engine = data, engine
        self._sums = self._nothing()
        # context ranks share sequences: each has a part of a loss, but all count the same tokens
        self._counts_tokens = engine.mesh.coordinate("cp") == 0

    def add(self, batch: Batch, losses_N: torch.Tensor) -> None:
        """A step of this rank: its sequences, and the sums of their losses."""
        sources = batch.sources.to(losses_N.device)
        self._sums[0].index_add_(0, sources, losses_N.double())
        if self._counts_tokens:
            tokens = (batch.labels != IGNORE).sum(1).to(losses_N.device)
            self._sums[1].index_add_(0, sources, tokens.double())

    def counts(self, step: int) -> dict[str, SourceCounts]:
        """What each source has given after ``step`` steps; then the sums start anew. Collective."""
        losses, counts = self.engine.over_all_ranks(self._sums).tolist()
        self._sums = self._nothing()
        consumed = self.data.blend.counts(self.data.steps.first_sample(step))
        return {
            name: SourceCounts(
                tokens=consumed[i] * self.data.steps.window,
                epoch=consumed[i] / self.data.samples[name].num_samples,
                loss=losses[i] / counts[i] if counts[i] else None,
            )
            for i, name in enumerate(self.data.names)
        }

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(2, len(self.data.names), dtype=torch.float64, device=self.engine.mesh.device)
