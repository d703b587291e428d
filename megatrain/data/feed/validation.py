"""Validation sets: each read from its start, in order, always the same batches."""

from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.loader import Loader, OneSource
from megatrain.data.feed.objectives import build_objective
from megatrain.data.feed.samples import sequential_samples, tells_documents_apart
from megatrain.data.feed.steps import Steps, StepShape
from megatrain.data.feed.tokenizer_match import require_one_tokenizer
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.derive import num_tokens


def validation_sets(config: ResolvedRun, vocab_size: int) -> dict[str, TokenDataset]:
    """The validation sets of a config, by name.

    Raises:
        DataError: one can't be opened, or doesn't fit the model or the training data.
    """
    opened = {name: TokenDataset.open(path, vocab_size=vocab_size) for name, path in config.data.validation.items()}
    training = [TokenDataset.open(source.path) for source in config.data.train.values()][:1] if opened else []
    require_one_tokenizer([*training, *opened.values()], config.data.tokenizer)
    return opened


def validation_loader(
    dataset: TokenDataset, config: ResolvedRun, dp_rank: int, dp_size: int, pin: bool = False
) -> Loader:
    """Batches as large as the training's last ones; what comes after the data set's end has no labels.

    Raises:
        DataError: the objective needs a token that the data set's tokenizer lacks.
    """
    batch_size, seq_len = config.train.global_batch_size, config.data.seq_len
    return Loader(
        [sequential_samples(dataset, config.data)],
        OneSource(),
        Steps([StepShape(0, batch_size, seq_len)], seq_len),
        dp_rank=dp_rank,
        dp_size=dp_size,
        documents=tells_documents_apart(config.data),
        objective=build_objective(config.data, dataset, num_tokens(config.model), "validation"),
        pin=pin,
    )


def num_batches(loader: Loader) -> int:
    """Batches that hold a validation set once."""
    return -(-loader.sources[0].num_samples // loader.steps.shape(0).batch_size)
