"""Rows of Parquet and Arrow files (those that the ``datasets`` library saves). Needs the package pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatrain.config.extras import missing
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
        raise DataError(missing("pyarrow", f"reading {path}", error)) from error
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
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PAR1" or path.suffix.lower() != ".arrow":
        from pyarrow import parquet

        table = parquet.ParquetFile(path)
        name = _check(path, column, table.schema_arrow)
        yield from table.iter_batches(_BATCH_ROWS, columns=[name])
        return
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        if magic == b"ARROW1":  # the format of files; that of streams has no such head
            opened = pyarrow.ipc.open_file(mapped)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(mapped)
        for batch in batches:
            yield from (batch.slice(at, _BATCH_ROWS) for at in range(0, len(batch), _BATCH_ROWS))


def _column(path: Path, batch: Any, column: str) -> Any:
    import pyarrow
    from pyarrow import compute

    name = _check(path, column, batch.schema)
    texts = batch.column(name)
    if name != column:
        for part in column.removeprefix(f"{name}.").split("."):
            if not pyarrow.types.is_struct(texts.type) or texts.type.get_field_index(part) < 0:
                raise DataError(f"{path}: {name!r} holds {texts.type}, no {column!r}: choose another by --field")
            texts = compute.struct_field(texts, part)
    if pyarrow.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    if str(texts.type) not in _TEXTS:
        raise DataError(f"{path}: the column {column!r} holds {texts.type}, not text: choose another by --field")
    return texts.cast(pyarrow.large_binary())


def _check(path: Path, column: str, schema: Any) -> str:
    """The column of this name, or the one that "column.key" is inside of."""
    for name in (column, column.partition(".")[0]):
        if (count := schema.names.count(name)) > 1:
            raise DataError(f"{path} has {count} columns named {name!r}: give them different names")
        if count:
            return name
    raise DataError(f"{path} has no column {column!r}: choose one of {', '.join(schema.names)} by --field")
