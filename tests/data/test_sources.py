"""Every source of samples that ``data.sequences`` names, while training and while evaluating."""

from typing import ClassVar

from megatrain.config.schema import RunConfig
from megatrain.data.feed.rows import Samples
from megatrain.data.feed.samples import sequential_samples, shuffled_samples
from megatrain.data.shards.reader import TokenDataset
from tests.data.source_suite import SEQ, SourceSuite


class _Configured(SourceSuite):
    sequences: ClassVar[str]

    @classmethod
    def source(cls, dataset: TokenDataset, key: str) -> Samples:
        data = RunConfig.model_validate({"data": {"sequences": cls.sequences, "seq_len": SEQ, "eod_loss": False}}).data
        return shuffled_samples(dataset, data, key) if cls.endless else sequential_samples(dataset, data)


class TestShuffledWindows(_Configured):
    """The ring's last tokens make no window."""

    sequences, left_over = "mask_documents", SEQ


class TestSequentialWindows(_Configured):
    """The last token is only a label."""

    sequences, endless, left_over = "mask_documents", False, 1


class TestPackedDocuments(_Configured):
    sequences = "pack_documents"


class TestPackedDocumentsInOrder(_Configured):
    sequences, endless = "pack_documents", False


class TestOneDocumentInARow(_Configured):
    sequences = "one_document"


class TestOneDocumentInARowInOrder(_Configured):
    sequences, endless = "one_document", False
