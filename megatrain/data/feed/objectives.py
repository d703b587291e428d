"""What is to be learned of the tokens: a pure function of a batch, its samples' global numbers and a seed.

Without an objective of its own a batch is causal: each label is the next token. Shapes: N sequences, S tokens.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatrain.config.schema import DataConfig
from megatrain.data.errors import DataError
from megatrain.data.feed.order import keyed_stream
from megatrain.data.feed.rows import Batch
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.labels import IGNORE

_MASK_TOKENS = ("[MASK]", "<mask>")
_HIDDEN, _REPLACED = 0.8, 0.9  # of the chosen tokens 80 % are hidden, the next 10 % replaced, the rest kept


class Objective(Protocol):
    """Batches with inputs and labels of its own; it may write into the tensors of the batch that it is given."""

    def __call__(self, batch: Batch) -> Batch: ...


class Masked:
    """Masked language modelling (Devlin et al. 2019, section 3.1): a token is chosen with ``probability``, and is then
    hidden by ``mask_token``, replaced by a random token or left as it is. Its label is itself; others have none.

    Who is chosen depends on the sample's global number, so another epoch chooses others (Liu et al. 2019, section 4.1).

    Args:
        key: of the choice; another one, another choice.
        vocab_size: tokens that a random one is drawn from.
        never: tokens that are never chosen, whatever the probability.
    """

    def __init__(self, key: str, probability: float, mask_token: int, vocab_size: int, never: Collection[int] = ()):
        self._key, self._probability, self._mask_token, self._vocab_size = key, probability, mask_token, vocab_size
        self._never = np.array(sorted(never), np.int64)

    def __call__(self, batch: Batch) -> Batch:
        tokens, labels = batch.tokens.numpy(), batch.labels.numpy()
        words = keyed_stream(self._key, batch.sample_ids.numpy(), 3 * tokens.shape[1])
        choice, fate, random = words.reshape(*tokens.shape, 3).transpose(2, 0, 1)
        chosen = (_fraction(choice) < self._probability) & ~np.isin(tokens, self._never)
        if batch.lengths is not None:
            chosen &= np.arange(tokens.shape[1]) < batch.lengths.numpy()[:, None]
        labels[...] = np.where(chosen, tokens, IGNORE)
        share = _fraction(fate)
        replaced = chosen & (share >= _HIDDEN) & (share < _REPLACED)
        tokens[chosen & (share < _HIDDEN)] = self._mask_token
        tokens[replaced] = random[replaced] % np.uint64(self._vocab_size)
        return batch


def build_objective(data: DataConfig, dataset: TokenDataset | None, vocab_size: int, key: str) -> Objective | None:
    """The objective of a config, for data that are written like ``dataset``; None: causal.

    Args:
        key: what the batches are for; another one, another choice of tokens.
    Raises:
        DataError: no token hides others.
    """
    if data.objective == "causal" or dataset is None:
        return None
    path = dataset.tokenizer_path if data.tokenizer is None else Path(data.tokenizer)
    special = {} if path is None else _special_tokens(path)
    known = [special[name] for name in _MASK_TOKENS if name in special]
    mask_token = known[0] if known and data.mask_token is None else data.mask_token
    if mask_token is None or mask_token >= vocab_size:
        found = "no tokenizer is known" if path is None else f"{path} has neither {' nor '.join(_MASK_TOKENS)}"
        if mask_token is not None:
            found = f"{path} hides tokens by number {mask_token}, and the model has {vocab_size} tokens"
        raise DataError(
            f"data.objective = masked needs a token that hides others: {found}. Set data.mask_token to its id, which "
            "may be one that no text has; model.vocab_size counts it too"
        )
    never = {mask_token, *special.values()} | ({dataset.eod_id} if dataset.eod_id is not None else set())
    return Masked(f"{key} {data.seed}", data.mask_probability, mask_token, vocab_size, never)


def _special_tokens(path: Path) -> dict[str, int]:
    """Ids of the special tokens of a tokenizer.json, by their texts.

    Raises:
        DataError: it is none.
    """
    try:
        added: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
        return {token["content"]: token["id"] for token in added if token.get("special")}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}") from error


def _fraction(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers of [0, 1)."""
    fractions: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions
