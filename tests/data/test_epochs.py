"""Orders that must differ: of two epochs of documents, of two sources with the same content."""

import numpy as np

from megatrain.data.feed.document_rows import _GROUP, DocumentRows, ShuffledDocuments
from tests.data.factory import make_dataset
from tests.data.reading import training_data
from tests.data.test_document_rows import numbered

SEQ = 16


def test_two_epochs_of_documents_have_different_orders_inside_and_between_groups() -> None:
    num_chunks = 3 * _GROUP
    rows = DocumentRows(numbered([SEQ] * 1024 * num_chunks), SEQ, pack=False)
    samples = ShuffledDocuments(rows, "key")
    first, second = samples.places(np.arange(2 * samples.num_samples)).reshape(2, -1)
    assert sorted(first) == sorted(second) == list(range(rows.num_rows))
    groups = [[set(part // 1024) for part in np.split(epoch, 3)] for epoch in (first, second)]
    assert all(len(chunks) == _GROUP for epoch in groups for chunks in epoch)
    assert groups[0] != groups[1], "chunks come in another order"
    one_chunk = ShuffledDocuments(DocumentRows(numbered([SEQ] * 100), SEQ, pack=False), "key")
    assert list(one_chunk.places(np.arange(100))) != list(one_chunk.places(np.arange(100, 200)))


def test_two_sources_of_one_content_have_different_orders(tmp_path) -> None:
    path = str(make_dataset(tmp_path / "data", 2000))
    data = training_data({name: {"path": path, "weight": "1"} for name in ("a", "b")})
    a, b = (data.samples[name].places(np.arange(40)) for name in ("a", "b"))
    assert list(a) != list(b)


def test_a_row_of_the_second_chunk_holds_its_own_tokens() -> None:
    rows = DocumentRows(numbered([SEQ] * 1500), SEQ, pack=False)
    assert rows.spans(1024 + 7) == [((1024 + 7) * SEQ, SEQ)]
