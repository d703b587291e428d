"""What a data set gives out one by one, as the config's ``data.sequences`` has it."""

from megatrain.config.schema import WHOLE_DOCUMENTS, DataConfig
from megatrain.data.feed.document_rows import DocumentRows, SequentialDocuments, ShuffledDocuments
from megatrain.data.feed.rows import Samples
from megatrain.data.feed.windows import SequentialWindows, ShuffledWindows
from megatrain.data.shards.reader import TokenDataset


def shuffled_samples(dataset: TokenDataset, data: DataConfig, key: str) -> Samples:
    """Endless epochs, each in its own order, which ``key`` fixes."""
    if data.sequences in WHOLE_DOCUMENTS:
        return ShuffledDocuments(DocumentRows(dataset, data.seq_len, data.sequences == "pack_documents"), key)
    return ShuffledWindows(dataset, data.seq_len, key, eod_has_loss(data))


def sequential_samples(dataset: TokenDataset, data: DataConfig) -> Samples:
    """The data set once, in order; samples after its end are empty."""
    if data.sequences in WHOLE_DOCUMENTS:
        return SequentialDocuments(DocumentRows(dataset, data.seq_len, data.sequences == "pack_documents"))
    return SequentialWindows(dataset, data.seq_len, eod_has_loss(data), tells_padding=data.objective != "causal")


def eod_has_loss(data: DataConfig) -> bool:
    """Whether another document's first token is a label that counts."""
    return data.sequences == "concatenate" if data.eod_loss is None else data.eod_loss


def tells_documents_apart(data: DataConfig) -> bool:
    """Whether batches carry positions; one document to a sequence needs none."""
    return data.sequences in ("mask_documents", "pack_documents")
