"""Rows of Parquet and Arrow files (those that the ``datasets`` library saves). Needs the package pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatrain.data.errors import DataError

_BATCH_ROWS = 1000
_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def read_rows(path: Path, column: str, skip: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and UTF-8 text of each row after the first ``skip``; None: null.

    Raises:
        DataError: no pyarrow, no such file or column, or the column holds no text.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: reading tables needs the package pyarrow (pip install pyarrow)") from error
    row = 0
    try:
        for batch in _batches(path, column):
            begin = max(0, skip - row)
            if begin < len(batch):
                texts = _column(path, batch, column)[begin:].to_pylist()
                yield from enumerate(texts, row + begin + 1)
            row += len(batch)
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _batches(path: Path, column: str) -> Iterator[Any]:
    if path.suffix != ".arrow":
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
        _check(path, column, file.schema_arrow.names)
        yield from file.iter_batches(_BATCH_ROWS, columns=[column])
        return
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        for batch in pyarrow.ipc.open_stream(mapped):
            yield from (batch.slice(at, _BATCH_ROWS) for at in range(0, len(batch), _BATCH_ROWS))


def _column(path: Path, batch: Any, column: str) -> Any:
    import pyarrow

    _check(path, column, batch.schema.names)
    texts = batch.column(column)
    if str(texts.type) not in _TEXTS:
        raise DataError(f"{path}: the column {column!r} holds {texts.type}, not text: choose another by --field")
    return texts.cast(pyarrow.large_binary())


def _check(path: Path, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise DataError(f"{path} has no column {column!r}: choose one of {', '.join(columns)} by --field")
